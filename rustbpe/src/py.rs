//! The border to Python: convert, release the GIL, look for Ctrl-C, turn errors into exceptions. No algorithm here.

use crate::encode::{self, TokenId};
use crate::parallel::{Interrupted, Texts};
use crate::split::Splitter;
use crate::train::{Counter, Pair, TrainError};
use pyo3::exceptions::{PyOverflowError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyByteArray, PyString};
use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Mutex;

/// Run work without the GIL. A panic would surface as PanicException, which `except Exception` does not catch: it
/// becomes a RuntimeError instead.
fn without_gil<R: Send>(py: Python<'_>, work: impl FnOnce() -> R + Send) -> PyResult<R> {
    let result = py.detach(|| catch_unwind(AssertUnwindSafe(work)));
    result.map_err(|_| PyRuntimeError::new_err("minillm_bpe failed internally; this is a bug of the crate"))
}

/// Run work that asks now and then whether to stop, without the GIL. Ctrl-C becomes the exception that Python raises.
fn interruptible<R: Send>(
    py: Python<'_>,
    work: impl FnOnce(&mut (dyn FnMut() -> bool + Send)) -> Result<R, Interrupted> + Send,
) -> PyResult<R> {
    let mut signal = None;
    let result = without_gil(py, || {
        work(&mut || {
            signal = Python::attach(|py| py.check_signals()).err();
            signal.is_some()
        })
    })?;
    result.map_err(|Interrupted| signal.unwrap_or_else(|| PyRuntimeError::new_err("interrupted")))
}

/// Counts words batch by batch, then learns merges. Memory grows with the number of distinct words.
#[pyclass]
struct Trainer {
    counter: Counter,
}

#[pymethods]
impl Trainer {
    #[new]
    #[pyo3(signature = (num_threads=0))]
    fn new(num_threads: usize) -> Self {
        Trainer { counter: Counter::new(num_threads) }
    }

    #[getter]
    fn num_words(&mut self, py: Python<'_>) -> PyResult<usize> {
        let counter = &mut self.counter;
        interruptible(py, |interrupted| counter.num_words(interrupted))
    }

    fn feed(&mut self, py: Python<'_>, texts: Vec<Bound<'_, PyString>>) -> PyResult<()> {
        // Bytes of our own, let go at the end: asking a str for its UTF-8 would leave the bytes with the str
        let texts = texts.iter().map(|text| text.encode_utf8().map(PyBackedBytes::from));
        let texts: Vec<PyBackedBytes> = texts.collect::<PyResult<_>>()?;
        let texts: Vec<&str> = texts.iter().map(|text| std::str::from_utf8(text).expect("Python encoded it")).collect();
        let counter = &mut self.counter;
        interruptible(py, |interrupted| counter.feed(&texts, interrupted))
    }

    #[pyo3(signature = (num_merges, report=None))]
    fn train(&mut self, py: Python<'_>, num_merges: usize, report: Option<Py<PyAny>>) -> PyResult<Vec<Pair>> {
        let counter = &mut self.counter;
        let mut error = None;
        let result = without_gil(py, || {
            counter.train(num_merges, |done| {
                error = Python::attach(|py| match &report {
                    Some(report) => py.check_signals().and_then(|()| report.call1(py, (done,)).map(|_| ())),
                    None => py.check_signals(),
                })
                .err();
                error.is_some()
            })
        })?;
        result.map_err(|reason| match reason {
            TrainError::Interrupted => error.unwrap_or_else(|| PyRuntimeError::new_err("interrupted")),
            TrainError::TooManyWords => PyOverflowError::new_err(
                "the distinct words exceed 4 GiB; the trainer counts positions in 32 bits; train on a sample",
            ),
        })
    }
}

/// Ids as uint16 or uint32.
enum Width {
    Narrow(encode::Encoder<u16>),
    Wide(encode::Encoder<u32>),
}

/// Text to ids for tokens in merge order. Equal to tiktoken with the same ranks and the GPT-4 pattern.
#[pyclass(frozen)]
struct Encoder {
    width: Width,
}

type Arrays<'py> = (Bound<'py, PyByteArray>, Bound<'py, PyByteArray>);

#[pymethods]
impl Encoder {
    #[new]
    fn new(py: Python<'_>, tokens: Vec<PyBackedBytes>, ids: Vec<u32>, narrow: bool) -> PyResult<Self> {
        let tokens: Vec<&[u8]> = tokens.iter().map(|token| &**token).collect();
        let width = without_gil(py, || match narrow {
            true => encode::Encoder::new(&tokens, &ids).map(Width::Narrow),
            false => encode::Encoder::new(&tokens, &ids).map(Width::Wide),
        })?;
        Ok(Encoder { width: width.map_err(PyValueError::new_err)? })
    }

    #[pyo3(signature = (texts, num_threads=0))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Py<PyString>>,
        num_threads: usize,
    ) -> PyResult<Arrays<'py>> {
        match &self.width {
            Width::Narrow(encoder) => encode_batch(py, encoder, texts, num_threads, u16::to_ne_bytes),
            Width::Wide(encoder) => encode_batch(py, encoder, texts, num_threads, u32::to_ne_bytes),
        }
    }
}

/// Texts as UTF-8, each converted when its turn comes. A str keeps its UTF-8 for as long as it lives.
struct Strings {
    texts: Vec<Py<PyString>>,
    error: Mutex<Option<PyErr>>, // why a text could not be had: a lone surrogate
}

impl Texts for Strings {
    fn lengths(&self) -> Vec<usize> {
        Python::attach(|py| self.texts.iter().map(|text| text.bind(py).len().unwrap_or(0)).collect())
    }

    fn fetch(&self, documents: Range<usize>) -> Option<Vec<&str>> {
        let texts: PyResult<Vec<&str>> =
            Python::attach(|py| self.texts[documents].iter().map(|text| text.to_str(py)).collect());
        texts.map_err(|error| self.error.lock().map(|mut place| *place = Some(error))).ok()
    }
}

fn encode_batch<'py, T: TokenId, const SIZE: usize>(
    py: Python<'py>,
    encoder: &encode::Encoder<T>,
    texts: Vec<Py<PyString>>,
    num_threads: usize,
    to_bytes: impl Fn(T) -> [u8; SIZE],
) -> PyResult<Arrays<'py>> {
    let texts = Strings { texts, error: Mutex::default() };
    let result = interruptible(py, |interrupted| encoder.encode_batch(&texts, num_threads, interrupted));
    if let Ok(Some(error)) = texts.error.into_inner() {
        return Err(error);
    }
    let (parts, counts) = result?;
    // A bytearray, because numpy makes a writable array of it; the copy runs at memory speed
    let total: usize = parts.iter().map(Vec::len).sum();
    let ids = PyByteArray::new_with(py, total * SIZE, |buffer| {
        let mut rest = buffer;
        for part in &parts {
            let cells;
            (cells, rest) = rest.split_at_mut(part.len() * SIZE);
            for (cell, id) in cells.chunks_exact_mut(SIZE).zip(part) {
                cell.copy_from_slice(&to_bytes(*id));
            }
        }
        Ok(())
    })?;
    let offsets = PyByteArray::new_with(py, (counts.len() + 1) * 8, |buffer| {
        let mut sum = 0i64;
        for (cell, count) in buffer.chunks_exact_mut(8).skip(1).zip(&counts) {
            sum += *count as i64;
            cell.copy_from_slice(&sum.to_ne_bytes());
        }
        Ok(())
    })?;
    Ok((ids, offsets))
}

/// The pieces of a text, as the pattern cuts them. For tests and for looking at.
#[pyfunction]
fn split(text: &str) -> Vec<&str> {
    Splitter::new(text).collect()
}

/// Byte-level BPE in Rust: the fast half of tokenizer.py.
#[pymodule]
fn minillm_bpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Trainer>()?;
    module.add_class::<Encoder>()?;
    module.add_function(wrap_pyfunction!(split, module)?)
}
