//! Work on many documents with several threads, and with an eye on Ctrl-C.

use crate::split::cut;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Threads take their work in chunks of about this many bytes: long enough that taking one costs nothing, short enough
/// that a thread with slow text does not keep the others waiting at the end.
const CHUNK_BYTES: usize = 1 << 18;

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

/// Run `work` on all documents, in chunks of `(index of the document, text)`; a long document comes in several parts,
/// cut where a piece ends anyway. The calling thread works too. Results are in the order of the text.
///
/// `num_threads`: 0 = one per core, and never more than there are chunks.
pub(crate) fn parallel<R: Send>(
    texts: &[&str],
    num_threads: usize,
    mut interrupted: impl FnMut() -> bool,
    work: impl Fn(&[(usize, &str)]) -> R + Sync,
) -> Result<Vec<R>, Interrupted> {
    let parts = |(index, text)| cut(text, CHUNK_BYTES).map(move |part| (index, part));
    let parts: Vec<(usize, &str)> = texts.iter().copied().enumerate().flat_map(parts).collect();
    let chunks = group(&parts);
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if num_threads == 0 { cores() } else { num_threads };

    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = |interrupted: &mut dyn FnMut() -> bool| {
        let mut done = Vec::new();
        while let Some(range) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if interrupted() {
                stop.store(true, Ordering::Relaxed);
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
            done.push((range.start, work(&parts[range.clone()])));
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
    done.sort_unstable_by_key(|(start, _)| *start);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

/// Neighbouring parts together, until there are CHUNK_BYTES of them.
fn group(parts: &[(usize, &str)]) -> Vec<Range<usize>> {
    let mut chunks: Vec<Range<usize>> = Vec::new();
    let mut size = CHUNK_BYTES;
    for (index, (_, text)) in parts.iter().enumerate() {
        if size >= CHUNK_BYTES {
            chunks.push(index..index);
            size = 0;
        }
        chunks.last_mut().expect("one was pushed at the first part").end = index + 1;
        size += text.len();
    }
    chunks
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
                    &texts,
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
        assert_eq!(parallel(&["text"], 2, || true, |_| ()), Err(Interrupted));
        let mut asked = 0;
        let slow = |_: &[(usize, &str)]| std::thread::sleep(Duration::from_millis(25));
        let long = "word ".repeat(1_000_000);
        let mut second = || {
            asked += 1;
            asked > 1
        };
        assert_eq!(parallel(&[&long], 1, &mut second, slow), Err(Interrupted));
        assert_eq!(asked, 2);
    }
}
