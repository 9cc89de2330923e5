//! Threads that do many short things together.
//!
//! A step of decoding is a chain of some forty products, each a few hundredths of a millisecond long. Handing every one
//! to a sleeping thread would take as long as the product; so the threads of a step are awake until it ends, and look
//! at a number to see whether there is work. A job comes in parts, and a thread takes the next one when it has time:
//! who is still asleep, or has to share a core with other programs, holds nobody up.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::Cell;
use std::hint::spin_loop;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{available_parallelism, yield_now};

/// Run `lead` on this thread. Each time it calls its argument with a job, the threads, this one among them, do
/// `work(job, part)` for each of `parts` parts; the call returns when all are done.
pub fn together<J: Copy + Send, R>(
    threads: usize,
    parts: usize,
    work: impl Fn(J, usize) + Sync,
    lead: impl FnOnce(&dyn Fn(J)) -> R,
) -> R {
    // The number of the present job above, the next of its parts below: one number, so that no thread takes a part of
    // one job for that of another
    let next = AtomicU64::new(0);
    let (done, over, broken) = (AtomicUsize::new(0), AtomicBool::new(false), AtomicBool::new(false));
    let job: Mutex<Option<J>> = Mutex::new(None);
    let take_parts = |number: u64, job: J| {
        while let Ok(taken) = next.fetch_update(Ordering::AcqRel, Ordering::Acquire, |next| {
            (next >> 32 == number && (next as u32 as usize) < parts).then_some(next + 1)
        }) {
            work(job, taken as u32 as usize);
            done.fetch_add(1, Ordering::Release);
        }
    };
    let follow = || {
        let _broken = OnPanic(&broken); // or the others would wait for its part for ever
        let mut number = 0;
        loop {
            wait(|| next.load(Ordering::Acquire) >> 32 != number || over.load(Ordering::Acquire));
            if over.load(Ordering::Acquire) {
                return;
            }
            let present = job.lock().expect("no thread panics with it");
            number = next.load(Ordering::Acquire) >> 32;
            let job = present.expect("set before its number is");
            drop(present);
            take_parts(number, job);
        }
    };
    pool().in_place_scope(|scope| {
        let _over = AtTheEnd(&over);
        for _ in 1..threads {
            scope.spawn(|_| follow());
        }
        let number = Cell::new(0);
        lead(&|new| {
            number.set(number.get() + 1);
            {
                // under the lock, so that nobody reads a job with another one's number
                let mut job = job.lock().expect("no thread panics with it");
                *job = Some(new);
                done.store(0, Ordering::Relaxed);
                next.store(number.get() << 32, Ordering::Release);
            }
            take_parts(number.get(), new);
            wait(|| done.load(Ordering::Acquire) == parts || broken.load(Ordering::Acquire));
            assert!(!broken.load(Ordering::Acquire), "another thread panicked");
        })
    })
}

/// Threads that sleep between steps: starting new ones would take longer than a step of a small model. After a fork
/// they are the parent's: the child has threads of its own.
fn pool() -> Arc<ThreadPool> {
    static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
    let mut pool = POOL.lock().expect("nobody panics with it");
    if let Some((_, pool)) = pool.as_ref().filter(|(owner, _)| *owner == process::id()) {
        return Arc::clone(pool);
    }
    let others = available_parallelism().map_or(1, |cores| cores.get().max(2) - 1);
    let new = Arc::new(ThreadPoolBuilder::new().num_threads(others).build().expect("threads can be started"));
    // the parent's is not dropped: that would wait for threads that are not here
    std::mem::forget(pool.replace((process::id(), Arc::clone(&new))));
    new
}

/// Wait for other threads: awake, but not for long where another program needs the core.
fn wait(ready: impl Fn() -> bool) {
    loop {
        for _ in 0..2000 {
            if ready() {
                return;
            }
            spin_loop();
        }
        yield_now();
    }
}

/// Sets its flag when the thread panics.
struct OnPanic<'a>(&'a AtomicBool);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

/// Sets its flag when it goes out of scope, by a panic as well.
struct AtTheEnd<'a>(&'a AtomicBool);

impl Drop for AtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_every_job_is_done_once_and_in_order() {
        for (threads, parts) in [(1, 1), (1, 3), (2, 1), (2, 7), (4, 16)] {
            let seen: Vec<Mutex<Vec<usize>>> = (0..parts).map(|_| Mutex::new(Vec::new())).collect();
            let result = together(
                threads,
                parts,
                |job: usize, part| seen[part].lock().unwrap().push(job),
                |all| {
                    for job in 0..2000 {
                        all(job);
                        assert!(seen.iter().all(|jobs| jobs.lock().unwrap().len() == job + 1));
                    }
                    7
                },
            );
            assert_eq!(result, 7);
            for jobs in seen {
                assert_eq!(jobs.into_inner().unwrap(), (0..2000).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_panic_ends_all_threads_wherever_it_happens() {
        for guilty in 0..6 {
            let work = |job: usize, part: usize| assert!(part != guilty || job < 3, "as asked");
            let result = std::panic::catch_unwind(|| together(3, 6, work, |all| (0..10).for_each(all)));
            assert!(result.is_err());
        }
        let result = std::panic::catch_unwind(|| together(3, 6, |_: usize, _| (), |_| panic!("the lead")));
        assert!(result.is_err());
    }
}
