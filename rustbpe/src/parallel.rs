//! Work on many documents with several threads, and with an eye on Ctrl-C.

use crate::split::cut;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Threads take their work in chunks of about this many bytes: long enough that taking one costs nothing, short enough
/// that a thread with slow text does not keep the others waiting at the end.
const CHUNK_BYTES: usize = 1 << 17;

/// The caller's check asked to stop (Ctrl-C).
#[derive(Debug, PartialEq, Eq)]
pub struct Interrupted;

/// Says every 20 ms that it is time to ask the caller: the question needs Python's lock, so not every time.
#[derive(Default)]
pub(crate) struct Clock(Option<Instant>);

impl Clock {
    /// True at the first call, and then at most every 20 ms.
    pub(crate) fn due(&mut self) -> bool {
        let due = self.0.is_none_or(|last| last.elapsed() >= Duration::from_millis(20));
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}

/// Documents that are fetched when their turn comes, by whatever thread works on them: a text of Python's must be
/// converted first, and while one thread does that, which takes Python's lock, others encode.
pub trait Texts: Sync {
    /// Length of each document: only to share them out, so that characters serve as well as bytes.
    fn lengths(&self) -> Vec<usize>;
    /// Some neighbouring documents. None: one of them cannot be had, stop.
    fn fetch(&self, documents: Range<usize>) -> Option<Vec<&str>>;
}

impl Texts for [&str] {
    fn lengths(&self) -> Vec<usize> {
        self.iter().map(|text| text.len()).collect()
    }

    fn fetch(&self, documents: Range<usize>) -> Option<Vec<&str>> {
        Some(self[documents].to_vec())
    }
}

/// Work for one thread.
enum Chunk<'a> {
    Documents(Range<usize>),
    /// A part of a long document, and which one that is
    Part(&'a str, usize),
}

/// Run `work` on all documents, in chunks of `(index of the document, text)`; a long document comes in several parts,
/// cut where a piece ends anyway. The calling thread works too. Results are in the order of the text.
///
/// `num_threads`: 0 = one per core, and never more than there are chunks. Error: `interrupted` said yes, or a document
/// could not be fetched.
pub(crate) fn parallel<R: Send>(
    texts: &(impl Texts + ?Sized),
    num_threads: usize,
    mut interrupted: impl FnMut() -> bool,
    work: impl Fn(&[(usize, &str)]) -> R + Sync,
) -> Result<Vec<R>, Interrupted> {
    let chunks = chunks(texts).ok_or(Interrupted)?;
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if num_threads == 0 { cores() } else { num_threads };
    let work_on = |chunk: &Chunk| match chunk {
        Chunk::Documents(range) => {
            let documents: Vec<_> = range.clone().zip(texts.fetch(range.clone())?).collect();
            Some(work(&documents))
        }
        Chunk::Part(text, index) => Some(work(&[(*index, text)])),
    };

    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = |interrupted: &mut dyn FnMut() -> bool| {
        let mut done = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = chunks.get(number) else { break };
            if interrupted() {
                stop.store(true, Ordering::Relaxed);
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
            match work_on(chunk) {
                Some(result) => done.push((number, result)),
                None => stop.store(true, Ordering::Relaxed),
            }
        }
        done
    };
    let mut clock = Clock::default();
    let mut done = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads.min(chunks.len())).map(|_| scope.spawn(|| run(&mut || false))).collect();
        let mut done = run(&mut || clock.due() && interrupted());
        for helper in helpers {
            done.extend(helper.join().expect("a panic here is a bug, which the border reports"));
        }
        done
    });
    if stop.into_inner() {
        return Err(Interrupted);
    }
    done.sort_unstable_by_key(|(number, _)| *number);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// Neighbouring documents together, until there are CHUNK_BYTES of them; long ones in parts. None: one of these cannot
/// be fetched.
fn chunks(texts: &(impl Texts + ?Sized)) -> Option<Vec<Chunk<'_>>> {
    let mut chunks = Vec::new();
    let mut size = 0; // of the last chunk
    for (index, length) in texts.lengths().into_iter().enumerate() {
        if length >= 2 * CHUNK_BYTES {
            let text = texts.fetch(index..index + 1)?[0];
            chunks.extend(cut(text, CHUNK_BYTES).map(|part| Chunk::Part(part, index)));
            continue;
        }
        match chunks.last_mut() {
            Some(Chunk::Documents(range)) if size < CHUNK_BYTES => range.end += 1,
            _ => {
                chunks.push(Chunk::Documents(index..index + 1));
                size = 0;
            }
        }
        size += length;
    }
    Some(chunks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_worked_on_once_in_order() {
        let long = "words, 数字 and 123 ".repeat(40_000);
        for texts in [vec![], vec![""], vec!["a", "", "b"], vec![&long], vec!["x", &long, "", &long, "y"]] {
            for threads in 1..4 {
                let seen = parallel(
                    &texts[..],
                    threads,
                    || false,
                    |chunk| chunk.iter().map(|(index, text)| (*index, text.to_string())).collect::<Vec<_>>(),
                );
                let mut whole = vec![String::new(); texts.len()];
                for (index, text) in seen.expect("not interrupted").concat() {
                    whole[index] += &text;
                }
                assert_eq!(whole, texts);
            }
        }
    }

    #[test]
    fn an_interrupt_ends_the_work() {
        assert_eq!(parallel(&["text"][..], 2, || true, |_| ()), Err(Interrupted));
        let mut asked = 0;
        let slow = |_: &[(usize, &str)]| std::thread::sleep(Duration::from_millis(25));
        let long = "word ".repeat(1_000_000);
        let mut second = || {
            asked += 1;
            asked > 1
        };
        assert_eq!(parallel(&[long.as_str()][..], 1, &mut second, slow), Err(Interrupted));
        assert_eq!(asked, 2);
    }
}
