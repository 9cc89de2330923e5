//! One forward of a dense Qwen3 model for a few tokens: norms, projections, rotation, attention, gated MLP, head.
//!
//! One thread leads: it does what is short, and calls all threads for what is long, the products and attention. Between
//! two such calls nobody else touches the numbers, so the locks here are never waited for; they are what lets the
//! compiler check that.
//!
//! Letters: N tokens of this forward (B rows of T), D hidden size, H heads, K kv heads, C head_dim, F MLP size, S slots
//! of the cache, L layers, V vocabulary.

use crate::products::{attend, exp, squares, Matrix, Rows, Stored};
use crate::team::together;

use std::ops::Range;
use std::sync::{Mutex, RwLock};

/// The weights of one layer; every matrix [out,in], as `torch.nn.Linear` stores it.
#[allow(missing_docs)]
pub struct Layer<'a> {
    pub attention_norm: &'a [f32],
    pub q: Matrix<'a>,
    pub k: Matrix<'a>,
    pub v: Matrix<'a>,
    pub q_norm: &'a [f32],
    pub k_norm: &'a [f32],
    pub o: Matrix<'a>,
    pub mlp_norm: &'a [f32],
    pub gate: Matrix<'a>,
    pub up: Matrix<'a>,
    pub down: Matrix<'a>,
}

/// The weights of a model.
#[allow(missing_docs)]
pub struct Weights<'a> {
    pub embedding: Matrix<'a>,
    pub layers: Vec<Layer<'a>>,
    pub norm: &'a [f32],
    pub head: Matrix<'a>,
    pub sizes: Sizes,
}

/// The sizes of a model.
#[allow(missing_docs)]
#[derive(Clone, Copy)]
pub struct Sizes {
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    pub vocabulary: usize,
    pub eps: f32,
}

/// Keys and values [L,2,B',K,S,C] of B' >= B rows.
#[allow(missing_docs)]
pub struct Cache<'a, W> {
    pub numbers: &'a mut [W],
    pub rows: usize,
    pub slots: usize,
}

/// Cosines and sines of the rotation [S,C], the sines negative in the first half.
#[allow(missing_docs)]
#[derive(Clone, Copy)]
pub struct Turns<'a> {
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

/// What all threads do together.
#[derive(Clone, Copy)]
enum Job {
    /// Queries, keys and values of the rows
    Project(usize),
    Attend(usize),
    Output(usize),
    /// silu(gate) * up
    Gate(usize),
    Down(usize),
    Head,
}

/// Everything that a step works on.
struct Step<'a, W> {
    weights: &'a Weights<'a>,
    turns: Turns<'a>,
    cache: RwLock<Cache<'a, W>>,
    /// Where each token stands: (row of the cache, position)
    places: RwLock<Vec<(usize, usize)>>,
    /// What a job reads [N,...]
    input: RwLock<Rows>,
    /// What comes of each part of a job, and room to make it
    made: Vec<Mutex<(Vec<f32>, Vec<f32>)>>,
}

/// Read tokens: their hidden states behind the final norm [N,D] and, if wanted, logits [N,V].
///
/// ids [B * T], T for each row; lengths [B]: how many slots of each row are filled. The tokens' keys and values are
/// written behind them.
pub fn forward<W: Stored>(
    weights: &Weights,
    cache: Cache<W>,
    turns: Turns,
    threads: usize,
    ids: &[u32],
    lengths: &[usize],
    with_logits: bool,
) -> (Vec<f32>, Option<Vec<f32>>) {
    Step::run(weights, cache, turns, threads, |step, all| {
        let hidden = step.hidden(ids, lengths, all);
        let logits = with_logits.then(|| step.logits(&hidden, all));
        (hidden, logits)
    })
}

/// Logits [N,V] of hidden states [N,D].
pub fn logits(weights: &Weights, threads: usize, hidden: &[f32]) -> Vec<f32> {
    let cache: Cache<f32> = Cache { numbers: &mut [], rows: 0, slots: 0 };
    let turns = Turns { cos: &[], sin: &[] };
    Step::run(weights, cache, turns, threads, |step, all| step.logits(hidden, all))
}

/// The `count` tokens that follow `token`, which stands behind the first `length` of one row: each the likeliest one.
pub fn guess<W: Stored>(
    weights: &Weights,
    cache: Cache<W>,
    turns: Turns,
    threads: usize,
    token: u32,
    length: usize,
    count: usize,
) -> Vec<u32> {
    Step::run(weights, cache, turns, threads, |step, all| {
        let mut found = vec![token];
        for length in length..length + count {
            let hidden = step.hidden(&found[found.len() - 1..], &[length], all);
            found.push(likeliest(&step.logits(&hidden, all)));
        }
        found.split_off(1)
    })
}

/// Index of the largest number, the first of equal ones.
fn likeliest(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    best.expect("a vocabulary is not empty") as u32
}

/// A part of `count` rows of a matrix.
fn share(count: usize, part: usize, parts: usize) -> Range<usize> {
    // in fours: products take four rows at once
    let border = |part: usize| count * part / parts / 4 * 4;
    border(part)..if part + 1 == parts { count } else { border(part + 1) }
}

impl<'a, W: Stored> Step<'a, W> {
    fn run<R>(
        weights: &'a Weights<'a>,
        cache: Cache<'a, W>,
        turns: Turns<'a>,
        threads: usize,
        lead: impl FnOnce(&Self, &dyn Fn(Job)) -> R,
    ) -> R {
        // more parts than threads: who is quick, or undisturbed, does more of them
        let parts = if threads > 1 { 2 * threads } else { 1 };
        let step = Step {
            weights,
            turns,
            cache: RwLock::new(cache),
            places: RwLock::default(),
            input: RwLock::default(),
            made: (0..parts).map(|_| Mutex::default()).collect(),
        };
        together(threads, step.made.len(), |job, part| step.work(job, part), |all| lead(&step, all))
    }

    /// As forward().
    fn hidden(&self, ids: &[u32], lengths: &[usize], all: &dyn Fn(Job)) -> Vec<f32> {
        let (weights, sizes, count) = (self.weights, self.weights.sizes, ids.len() / lengths.len());
        *self.places.write().expect("only read by threads") =
            (0..ids.len()).map(|n| (n / count, lengths[n / count] + n % count)).collect();
        self.clear_behind(lengths, count);
        let mut x = vec![0.0; ids.len() * sizes.hidden];
        for (x, id) in x.chunks_exact_mut(sizes.hidden).zip(ids) {
            weights.embedding.row(*id as usize, x);
        }
        for (index, layer) in weights.layers.iter().enumerate() {
            let qkv = self.product(&x, Some(layer.attention_norm), Job::Project(index), all);
            let queries = self.place_heads(layer, index, qkv);
            let seen = self.product(&queries, None, Job::Attend(index), all);
            add(&mut x, &self.product(&seen, None, Job::Output(index), all));
            let gated = self.product(&x, Some(layer.mlp_norm), Job::Gate(index), all);
            add(&mut x, &self.product(&gated, None, Job::Down(index), all));
        }
        normalize(&mut x, weights.norm, sizes.eps);
        x
    }

    /// As logits().
    fn logits(&self, hidden: &[f32], all: &dyn Fn(Job)) -> Vec<f32> {
        self.product(hidden, None, Job::Head, all)
    }

    /// Shorter rows hold numbers up to the end of the longest, be they of nobody: whoever reads this cache with a mask
    /// multiplies them by 0, and 0 times what happens to stand in memory may be NaN.
    fn clear_behind(&self, lengths: &[usize], count: usize) {
        let mut cache = self.cache.write().expect("threads wait");
        let end = lengths.iter().max().expect("rows") + count;
        let columns = self.weights.sizes.head_dim;
        for layer in 0..self.weights.layers.len() {
            for (row, length) in lengths.iter().enumerate().filter(|(_, length)| **length + count < end) {
                for head in 0..2 * self.weights.sizes.kv_heads {
                    let (half, head) = (head / self.weights.sizes.kv_heads, head % self.weights.sizes.kv_heads);
                    let start = self.place(&cache, layer, half, row, head).start;
                    // from where this forward's tokens end; what lies between there and the old end was cleared then
                    let fresh = (length + count).max(end - count);
                    cache.numbers[start + fresh * columns..start + end * columns].fill(W::nearest(0.0));
                }
            }
        }
    }

    /// Let all threads do a job with these rows, normalised before where there is a gain, and put together what they
    /// made [N,...].
    fn product(&self, rows: &[f32], gain: Option<&[f32]>, job: Job, all: &dyn Fn(Job)) -> Vec<f32> {
        let (columns, matrices) = self.matrices(job);
        {
            let mut input = self.input.write().expect("threads wait");
            input.numbers.clear();
            input.numbers.extend_from_slice(rows);
            if let Some(gain) = gain {
                normalize(&mut input.numbers, gain, self.weights.sizes.eps);
            }
            input.set(columns, matrices.first().map(|(matrix, _)| *matrix));
        }
        all(job);
        let count = rows.len() / columns;
        let sizes: Vec<usize> = match job {
            Job::Attend(_) => return self.gather_heads(count),
            Job::Gate(_) => vec![self.weights.sizes.mlp], // of two matrices
            _ => matrices.iter().map(|(_, size)| *size).collect(),
        };
        let width = sizes.iter().sum::<usize>();
        let mut out = vec![0.0; count * width];
        for (part, made) in self.made.iter().enumerate() {
            let made = &made.lock().expect("threads wait").0;
            let (mut from, mut before) = (0, 0);
            for size in &sizes {
                let rows = share(*size, part, self.made.len());
                for n in 0..count {
                    let place = n * width + before + rows.start;
                    out[place..place + rows.len()].copy_from_slice(&made[from..from + rows.len()]);
                    from += rows.len();
                }
                before += size;
            }
        }
        out
    }

    /// The columns of what a job reads, and the matrices that it multiplies it with, with their rows.
    fn matrices(&self, job: Job) -> (usize, Vec<(&Matrix<'a>, usize)>) {
        let (sizes, layers) = (self.weights.sizes, &self.weights.layers);
        let (inner, kv) = (sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim);
        match job {
            Job::Project(i) => (sizes.hidden, vec![(&layers[i].q, inner), (&layers[i].k, kv), (&layers[i].v, kv)]),
            Job::Attend(_) => (inner, vec![]),
            Job::Output(i) => (inner, vec![(&layers[i].o, sizes.hidden)]),
            Job::Gate(i) => (sizes.hidden, vec![(&layers[i].up, sizes.mlp), (&layers[i].gate, sizes.mlp)]),
            Job::Down(i) => (sizes.mlp, vec![(&layers[i].down, sizes.hidden)]),
            Job::Head => (sizes.hidden, vec![(&self.weights.head, sizes.vocabulary)]),
        }
    }

    /// The heads' results [N,H*C]: part p made those of the (token, kv head) pairs p, p + parts, ...
    fn gather_heads(&self, count: usize) -> Vec<f32> {
        let sizes = self.weights.sizes;
        let group = sizes.heads / sizes.kv_heads * sizes.head_dim;
        let mut out = vec![0.0; count * sizes.heads * sizes.head_dim];
        for (part, made) in self.made.iter().enumerate() {
            let made = &made.lock().expect("threads wait").0;
            let places = out.chunks_exact_mut(group).skip(part).step_by(self.made.len());
            places.zip(made.chunks_exact(group)).for_each(|(out, made)| out.copy_from_slice(made));
        }
        out
    }

    /// Do a part of a job.
    fn work(&self, job: Job, part: usize) {
        let input = self.input.read().expect("written between jobs");
        let mut made = self.made[part].lock().expect("taken once");
        let (out, room) = &mut *made;
        out.clear();
        if let Job::Attend(layer) = job {
            return self.attend(layer, part, &input.numbers, room, out);
        }
        for (matrix, size) in self.matrices(job).1 {
            let (rows, start) = (share(size, part, self.made.len()), out.len());
            out.resize(start + input.count() * rows.len(), 0.0);
            if !rows.is_empty() {
                matrix.multiply(&input, rows, &mut out[start..]);
            }
        }
        if let Job::Gate(_) = job {
            let half = out.len() / 2;
            let (up, gate) = out.split_at_mut(half);
            up.iter_mut().zip(gate).for_each(|(up, gate)| *up *= *gate / (1.0 + exp(-*gate)));
            out.truncate(half);
        }
    }

    /// Attention of this part's (token, kv head) pairs.
    fn attend(&self, layer: usize, part: usize, queries: &[f32], scores: &mut Vec<f32>, out: &mut Vec<f32>) {
        let sizes = self.weights.sizes;
        let cache = self.cache.read().expect("written between jobs");
        let places = self.places.read().expect("written between jobs");
        let group = sizes.heads / sizes.kv_heads * sizes.head_dim;
        for (pair, queries) in queries.chunks_exact(group).enumerate().skip(part).step_by(self.made.len()) {
            let ((row, position), head) = (places[pair / sizes.kv_heads], pair % sizes.kv_heads);
            let seen = |half| {
                let place = self.place(&cache, layer, half, row, head);
                &cache.numbers[place.start..place.start + (position + 1) * sizes.head_dim]
            };
            let start = out.len();
            out.resize(start + group, 0.0);
            attend(queries, seen(0), seen(1), sizes.head_dim, scores, &mut out[start..]);
        }
    }

    /// Normalise queries and keys [N,(H+2K)*C] and turn them by their positions; keys and values go to the cache.
    /// Returns the queries [N,H*C], divided by sqrt(C).
    fn place_heads(&self, layer: &Layer, index: usize, mut qkv: Vec<f32>) -> Vec<f32> {
        let sizes = self.weights.sizes;
        let (c, heads, kv_heads) = (sizes.head_dim, sizes.heads, sizes.kv_heads);
        let places = self.places.read().expect("threads wait");
        let mut cache = self.cache.write().expect("threads wait");
        let mut queries = Vec::with_capacity(places.len() * heads * c);
        for (qkv, (row, position)) in qkv.chunks_exact_mut((heads + 2 * kv_heads) * c).zip(&*places) {
            let (q, kv) = qkv.split_at_mut(heads * c);
            let k = &mut kv[..kv_heads * c];
            normalize(q, layer.q_norm, sizes.eps);
            normalize(k, layer.k_norm, sizes.eps);
            let turn = position * c..(position + 1) * c;
            let turns = Turns { cos: &self.turns.cos[turn.clone()], sin: &self.turns.sin[turn] };
            for head in q.chunks_exact_mut(c) {
                rotate(head, turns);
                queries.extend(head.iter().map(|x| x / (c as f32).sqrt()));
            }
            k.chunks_exact_mut(c).for_each(|head| rotate(head, turns));
            for (number, head) in kv.chunks_exact(c).enumerate() {
                let place = self.place(&cache, index, number / kv_heads, *row, number % kv_heads);
                let slot = &mut cache.numbers[place][position * c..(position + 1) * c];
                slot.iter_mut().zip(head).for_each(|(slot, x)| *slot = W::nearest(*x));
            }
        }
        queries
    }

    /// Where the slots of a head lie: half 0 keys, 1 values.
    fn place(&self, cache: &Cache<W>, layer: usize, half: usize, row: usize, head: usize) -> Range<usize> {
        let size = cache.slots * self.weights.sizes.head_dim;
        let index = ((layer * 2 + half) * cache.rows + row) * self.weights.sizes.kv_heads + head;
        index * size..(index + 1) * size
    }
}

/// RMSNorm of each row [...,D], D the size of the gain.
fn normalize(x: &mut [f32], gain: &[f32], eps: f32) {
    for x in x.chunks_exact_mut(gain.len()) {
        let scale = 1.0 / (squares(x) / gain.len() as f32 + eps).sqrt();
        x.iter_mut().zip(gain).for_each(|(x, gain)| *x *= scale * gain);
    }
}

/// Turn a head [C]: number i and number i + C/2 are a point in the plane.
fn rotate(head: &mut [f32], turns: Turns) {
    let half = head.len() / 2;
    let (left, right) = head.split_at_mut(half);
    for (i, (a, b)) in left.iter_mut().zip(right).enumerate() {
        (*a, *b) = (*a * turns.cos[i] + *b * turns.sin[i], *b * turns.cos[half + i] + *a * turns.sin[half + i]);
    }
}

/// x += y.
fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}
