//! The border to Python: borrow arrays, check sizes, release the GIL. No algorithm here.

use crate::products::{Matrix, Stored};
use crate::step::{self, Cache, Layer, Sizes, Turns, Weights};

use numpy::{
    Element, PyArray1, PyArray2, PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use std::panic::{catch_unwind, AssertUnwindSafe};

/// A matrix [M,K] that Python keeps; bf16 comes as uint16, int8 with the scales of its rows.
#[derive(FromPyObject)]
enum Kept {
    Single(Py<PyArray2<f32>>),
    Half(Py<PyArray2<u16>>),
    Quarter(Py<PyArray2<i8>>, Py<PyArray1<f32>>),
}

/// The same while a call reads it.
enum Borrowed<'py> {
    Single(PyReadonlyArray2<'py, f32>),
    Half(PyReadonlyArray2<'py, u16>),
    Quarter(PyReadonlyArray2<'py, i8>, PyReadonlyArray1<'py, f32>),
}

impl Kept {
    fn borrow<'py>(&self, py: Python<'py>) -> PyResult<Borrowed<'py>> {
        Ok(match self {
            Kept::Single(numbers) => Borrowed::Single(numbers.bind(py).try_readonly()?),
            Kept::Half(numbers) => Borrowed::Half(numbers.bind(py).try_readonly()?),
            Kept::Quarter(numbers, scales) => {
                Borrowed::Quarter(numbers.bind(py).try_readonly()?, scales.bind(py).try_readonly()?)
            }
        })
    }

    /// Error: its shape is another one.
    fn check(&self, py: Python<'_>, name: &str, rows: usize, columns: usize) -> PyResult<()> {
        let (shape, scales) = match self {
            Kept::Single(numbers) => (numbers.bind(py).shape().to_vec(), rows),
            Kept::Half(numbers) => (numbers.bind(py).shape().to_vec(), rows),
            Kept::Quarter(numbers, scales) => (numbers.bind(py).shape().to_vec(), scales.bind(py).len()),
        };
        if shape != [rows, columns] || scales != rows {
            return Err(PyValueError::new_err(format!(
                "{name} is {shape:?} with {scales} scales; it has the shape [{rows}, {columns}]"
            )));
        }
        self.borrow(py)?.matrix().map(|_| ())
    }
}

impl Borrowed<'_> {
    fn matrix(&self) -> PyResult<Matrix<'_>> {
        in_order(match self {
            Borrowed::Single(numbers) => numbers.is_c_contiguous(),
            Borrowed::Half(numbers) => numbers.is_c_contiguous(),
            Borrowed::Quarter(numbers, _) => numbers.is_c_contiguous(),
        })?;
        Ok(match self {
            Borrowed::Single(numbers) => Matrix::Single(numbers.as_slice()?),
            Borrowed::Half(numbers) => Matrix::Half(numbers.as_slice()?),
            Borrowed::Quarter(numbers, scales) => Matrix::Quarter(numbers.as_slice()?, scales.as_slice()?),
        })
    }
}

type Gain = Py<PyArray1<f32>>;

/// One layer as Python gives it, in the order of `step::Layer`.
#[derive(FromPyObject)]
struct KeptLayer(Gain, Kept, Kept, Kept, Gain, Gain, Kept, Gain, Kept, Kept, Kept);

/// A dense Qwen3 model whose weights Python keeps.
#[pyclass(frozen)]
struct Decoder {
    layers: Vec<KeptLayer>,
    embedding: Kept,
    norm: Gain,
    head: Kept,
    sizes: Sizes,
    threads: usize,
}

/// Hidden states [N,D] and logits [N,V].
type Arrays<'py> = (Bound<'py, PyArray2<f32>>, Option<Bound<'py, PyArray2<f32>>>);

#[pymethods]
impl Decoder {
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        layers: Vec<KeptLayer>,
        embedding: Kept,
        norm: Gain,
        head: Kept,
        heads: usize,
        kv_heads: usize,
        mlp: usize,
        eps: f32,
        num_threads: usize,
    ) -> PyResult<Self> {
        let hidden = norm.bind(py).len();
        let head_dim = layers.first().map_or(0, |layer| layer.4.bind(py).len());
        let vocabulary = match &embedding {
            Kept::Single(numbers) => numbers.bind(py).shape()[0],
            Kept::Half(numbers) => numbers.bind(py).shape()[0],
            Kept::Quarter(numbers, _) => numbers.bind(py).shape()[0],
        };
        if layers.is_empty()
            || head_dim == 0
            || kv_heads == 0
            || !heads.is_multiple_of(kv_heads)
            || !head_dim.is_multiple_of(2)
            || num_threads == 0
            || vocabulary == 0
        {
            return Err(PyValueError::new_err(format!(
                "{heads} heads, {kv_heads} kv heads of {head_dim} numbers, {vocabulary} tokens, {num_threads} threads; \
                 heads are a multiple of kv heads, their numbers even, and there is at least one of each"
            )));
        }
        let (inner, kv) = (heads * head_dim, kv_heads * head_dim);
        embedding.check(py, "embedding", vocabulary, hidden)?;
        head.check(py, "head", vocabulary, hidden)?;
        for layer in &layers {
            layer.1.check(py, "q", inner, hidden)?;
            layer.2.check(py, "k", kv, hidden)?;
            layer.3.check(py, "v", kv, hidden)?;
            layer.6.check(py, "o", hidden, inner)?;
            layer.8.check(py, "gate", mlp, hidden)?;
            layer.9.check(py, "up", mlp, hidden)?;
            layer.10.check(py, "down", hidden, mlp)?;
            let gains = [(&layer.0, hidden), (&layer.4, head_dim), (&layer.5, head_dim), (&layer.7, hidden)];
            if gains.iter().any(|(gain, size)| gain.bind(py).len() != *size) {
                return Err(PyValueError::new_err("the gain of a norm has another size than what it multiplies"));
            }
        }
        let sizes = Sizes { hidden, heads, kv_heads, head_dim, mlp, vocabulary, eps };
        Ok(Decoder { layers, embedding, norm, head, sizes, threads: num_threads })
    }

    #[allow(clippy::too_many_arguments)]
    fn step<'py>(
        &self,
        py: Python<'py>,
        ids: Vec<u32>,
        lengths: Vec<usize>,
        kv: &Bound<'py, PyAny>,
        cos: PyReadonlyArray2<'py, f32>,
        sin: PyReadonlyArray2<'py, f32>,
        with_logits: bool,
    ) -> PyResult<Arrays<'py>> {
        if lengths.is_empty() || ids.is_empty() || !ids.len().is_multiple_of(lengths.len()) {
            return Err(PyValueError::new_err("as many ids for each row, and at least one"));
        }
        in_order(cos.is_c_contiguous() && sin.is_c_contiguous())?;
        let turns = Turns { cos: cos.as_slice()?, sin: sin.as_slice()? };
        let reads = Reads { ids: &ids, lengths: &lengths, count: ids.len() / lengths.len(), with_logits };
        let (hidden, logits) = match kv.cast::<PyArrayDyn<f32>>() {
            Ok(kv) => self.read(py, kv, turns, reads)?,
            Err(_) => self.read(py, kv.cast::<PyArrayDyn<u16>>()?, turns, reads)?,
        };
        let logits = logits.map(|logits| rows_of(py, logits, self.sizes.vocabulary)).transpose()?;
        Ok((rows_of(py, hidden, self.sizes.hidden)?, logits))
    }

    fn logits<'py>(&self, py: Python<'py>, hidden: PyReadonlyArray2<'py, f32>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        if hidden.shape()[1] != self.sizes.hidden {
            return Err(PyValueError::new_err("hidden states of another size"));
        }
        in_order(hidden.is_c_contiguous())?;
        let rows = hidden.as_slice()?;
        let logits = self.with_weights(py, |weights| step::logits(weights, self.threads, rows))?;
        rows_of(py, logits, self.sizes.vocabulary)
    }

    #[allow(clippy::too_many_arguments)]
    fn guess<'py>(
        &self,
        py: Python<'py>,
        token: u32,
        length: usize,
        count: usize,
        kv: &Bound<'py, PyAny>,
        cos: PyReadonlyArray2<'py, f32>,
        sin: PyReadonlyArray2<'py, f32>,
    ) -> PyResult<Vec<u32>> {
        in_order(cos.is_c_contiguous() && sin.is_c_contiguous())?;
        let turns = Turns { cos: cos.as_slice()?, sin: sin.as_slice()? };
        let (ids, lengths) = ([token], [length]);
        let reads = Reads { ids: &ids, lengths: &lengths, count, with_logits: false };
        match kv.cast::<PyArrayDyn<f32>>() {
            Ok(kv) => self.look_ahead(py, kv, turns, reads),
            Err(_) => self.look_ahead(py, kv.cast::<PyArrayDyn<u16>>()?, turns, reads),
        }
    }
}

/// What a call reads: ids, the filled slots of each row, and how many tokens will stand behind them.
#[derive(Clone, Copy)]
struct Reads<'a> {
    ids: &'a [u32],
    lengths: &'a [usize],
    count: usize,
    with_logits: bool,
}

impl Decoder {
    fn read<'py, W: Stored + Element>(
        &self,
        py: Python<'py>,
        kv: &Bound<'py, PyArrayDyn<W>>,
        turns: Turns,
        reads: Reads,
    ) -> PyResult<(Vec<f32>, Option<Vec<f32>>)> {
        self.with_cache(py, kv, turns, reads, |weights, cache| {
            step::forward(weights, cache, turns, self.threads, reads.ids, reads.lengths, reads.with_logits)
        })
    }

    fn look_ahead<'py, W: Stored + Element>(
        &self,
        py: Python<'py>,
        kv: &Bound<'py, PyArrayDyn<W>>,
        turns: Turns,
        reads: Reads,
    ) -> PyResult<Vec<u32>> {
        self.with_cache(py, kv, turns, reads, |weights, cache| {
            step::guess(weights, cache, turns, self.threads, reads.ids[0], reads.lengths[0], reads.count)
        })
    }

    /// Run work that reads the weights and writes to the cache, once what it reads has been found to fit.
    fn with_cache<'py, W: Stored + Element, R: Send>(
        &self,
        py: Python<'py>,
        kv: &Bound<'py, PyArrayDyn<W>>,
        turns: Turns,
        reads: Reads,
        work: impl FnOnce(&Weights, Cache<W>) -> R + Send,
    ) -> PyResult<R> {
        self.check(kv.shape(), turns, reads)?;
        in_order(kv.is_c_contiguous())?;
        let (rows, slots) = (kv.shape()[2], kv.shape()[4]);
        let mut kv = kv.try_readwrite()?;
        let cache = Cache { numbers: kv.as_slice_mut()?, rows, slots };
        self.with_weights(py, |weights| work(weights, cache))
    }

    /// Error: the cache [L,2,B,K,S,C] is another model's, too short, or too small for so many rows.
    fn check(&self, kv: &[usize], turns: Turns, reads: Reads) -> PyResult<()> {
        let Sizes { kv_heads, head_dim, vocabulary, .. } = self.sizes;
        let fits = kv.len() == 6
            && [kv[0], kv[1], kv[3], kv[5]] == [self.layers.len(), 2, kv_heads, head_dim]
            && reads.lengths.len() <= kv[2]
            && turns.cos.len() == turns.sin.len();
        let slots = if fits { kv[4].min(turns.cos.len() / head_dim) } else { 0 };
        if reads.lengths.iter().any(|length| length.saturating_add(reads.count) > slots) {
            return Err(PyValueError::new_err(format!(
                "a cache {kv:?} and {} turns for {} rows of up to {:?} + {} tokens; they do not fit",
                turns.cos.len() / head_dim,
                reads.lengths.len(),
                reads.lengths.iter().max(),
                reads.count
            )));
        }
        match reads.ids.iter().find(|id| **id as usize >= vocabulary) {
            Some(id) => Err(PyValueError::new_err(format!("id {id} is outside a vocabulary of {vocabulary}"))),
            None => Ok(()),
        }
    }

    /// Run work that reads the weights, without the GIL. A panic would surface as PanicException, which `except
    /// Exception` does not catch: it becomes a RuntimeError instead.
    fn with_weights<R: Send>(&self, py: Python<'_>, work: impl FnOnce(&Weights) -> R + Send) -> PyResult<R> {
        let matrices: Vec<[Borrowed; 7]> = self
            .layers
            .iter()
            .map(|layer| {
                Ok([
                    layer.1.borrow(py)?,
                    layer.2.borrow(py)?,
                    layer.3.borrow(py)?,
                    layer.6.borrow(py)?,
                    layer.8.borrow(py)?,
                    layer.9.borrow(py)?,
                    layer.10.borrow(py)?,
                ])
            })
            .collect::<PyResult<_>>()?;
        let gains: Vec<[PyReadonlyArray1<f32>; 4]> = self
            .layers
            .iter()
            .map(|layer| {
                Ok([
                    layer.0.bind(py).try_readonly()?,
                    layer.4.bind(py).try_readonly()?,
                    layer.5.bind(py).try_readonly()?,
                    layer.7.bind(py).try_readonly()?,
                ])
            })
            .collect::<PyResult<_>>()?;
        let layers = matrices.iter().zip(&gains).map(|([q, k, v, o, gate, up, down], gains)| {
            Ok(Layer {
                attention_norm: gains[0].as_slice()?,
                q: q.matrix()?,
                k: k.matrix()?,
                v: v.matrix()?,
                q_norm: gains[1].as_slice()?,
                k_norm: gains[2].as_slice()?,
                o: o.matrix()?,
                mlp_norm: gains[3].as_slice()?,
                gate: gate.matrix()?,
                up: up.matrix()?,
                down: down.matrix()?,
            })
        });
        let (embedding, head) = (self.embedding.borrow(py)?, self.head.borrow(py)?);
        let norm = self.norm.bind(py).try_readonly()?;
        let weights = Weights {
            embedding: embedding.matrix()?,
            layers: layers.collect::<PyResult<_>>()?,
            norm: norm.as_slice()?,
            head: head.matrix()?,
            sizes: self.sizes,
        };
        let result = py.detach(|| catch_unwind(AssertUnwindSafe(|| work(&weights))));
        result.map_err(|_| PyRuntimeError::new_err("minillm_decode failed internally; this is a bug of the crate"))
    }
}

/// Error: an array that lies column by column; its slice would be that of its transpose.
fn in_order(rows_first: bool) -> PyResult<()> {
    match rows_first {
        true => Ok(()),
        false => Err(PyValueError::new_err("an array that does not lie row by row in memory; make it contiguous")),
    }
}

/// Numbers as an array [N,columns].
fn rows_of(py: Python<'_>, numbers: Vec<f32>, columns: usize) -> PyResult<Bound<'_, PyArray2<f32>>> {
    let rows = numbers.len() / columns;
    PyArray1::from_vec(py, numbers).reshape([rows, columns])
}

/// One step of decoding in Rust: the fast half of inference.py.
#[pymodule]
fn minillm_decode(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Decoder>()
}
