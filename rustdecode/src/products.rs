//! Rows times a matrix, for few rows: as fast as the matrix can be read.
//!
//! Every dot product is summed in the same order, whatever else is computed beside it: 16 sums, of the numbers 0, 16,
//! 32 ..., of the numbers 1, 17, 33 ... and so on, which are then added in pairs. So a row has the same result alone
//! and among others, to the last bit, and what is computed for several tokens at once is what would be computed for
//! each.
//! With 8-bit weights the 16 sums are of whole numbers, and exact.

use crate::vectors::{narrow, run, widen, Machine, Work, LANES};
use std::ops::Range;

/// A matrix [M,K], row by row.
#[derive(Clone, Copy)]
pub enum Matrix<'a> {
    /// 4 bytes a number.
    Single(&'a [f32]),
    /// bf16, 2 bytes a number.
    Half(&'a [u16]),
    /// 1 byte a number, and a scale for each row [M].
    Quarter(&'a [i8], &'a [f32]),
}

/// Rows [N,K] that are multiplied with matrices.
#[derive(Default)]
pub struct Rows {
    /// N * K numbers
    pub numbers: Vec<f32>,
    columns: usize,
    /// The same in 16 bits, and what a step of each row is worth [N]
    whole: Vec<i16>,
    steps: Vec<f32>,
}

impl Rows {
    /// Say that `numbers` have changed; they will be multiplied with such a matrix, if with any.
    ///
    /// With 8-bit weights, numbers in 16 bits make sums of whole numbers, which take a third of the instructions of
    /// sums in f32. They have twice the bits of the weights, so it is those that decide what is lost.
    pub fn set(&mut self, columns: usize, matrix: Option<&Matrix>) {
        self.columns = columns;
        self.whole.clear();
        self.steps.clear();
        if !matches!(matrix, Some(Matrix::Quarter(..))) {
            return;
        }
        // each of LANES sums adds up K / LANES products of at most 128 * largest, which must stay below 2^31
        let largest = (((1 << 24) * LANES - 1) / columns.next_multiple_of(2 * LANES)).min(i16::MAX as usize) as f32;
        for row in self.numbers.chunks_exact(columns) {
            // as bits: numbers without sign have the order of their bits, and whole numbers are compared many at once
            let most = row.iter().map(|x| x.to_bits() & 0x7FFF_FFFF).max().map_or(0.0, f32::from_bits);
            // not 0, and what is not a number stays so
            let step = if most < 1e-30 { 1e-30 } else { most } / largest;
            self.whole.extend(row.iter().map(|x| nearest(x / step) as i16));
            self.steps.push(step);
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.numbers.len() / self.columns
    }
}

impl Matrix<'_> {
    /// Products of the rows x [N,K] with these rows of the matrix [rows,K]: out [N,rows]. x was set() for it.
    pub fn multiply(&self, x: &Rows, rows: Range<usize>, out: &mut [f32]) {
        let columns = x.columns;
        let place = rows.start * columns..rows.end * columns;
        match self {
            Matrix::Single(numbers) => Products::<f32>::run(&numbers[place], &x.numbers, columns, out),
            Matrix::Half(numbers) => Products::<u16>::run(&numbers[place], &x.numbers, columns, out),
            Matrix::Quarter(numbers, scales) => {
                Products::<i8>::run(&numbers[place], &x.whole, columns, out);
                for (sums, step) in out.chunks_exact_mut(rows.len()).zip(&x.steps) {
                    sums.iter_mut().zip(&scales[rows.clone()]).for_each(|(sum, scale)| *sum *= scale * step);
                }
            }
        }
    }

    /// Row number `index` as f32, out [K].
    pub fn row(&self, index: usize, out: &mut [f32]) {
        let place = index * out.len()..(index + 1) * out.len();
        match self {
            Matrix::Single(numbers) => out.copy_from_slice(&numbers[place]),
            Matrix::Half(numbers) => out.iter_mut().zip(&numbers[place]).for_each(|(out, x)| *out = widen(*x)),
            Matrix::Quarter(numbers, scales) => {
                out.iter_mut().zip(&numbers[place]).for_each(|(out, x)| *out = f32::from(*x) * scales[index])
            }
        }
    }
}

// -- How numbers are multiplied and added up ------------------------------------------------------------------------

/// What a matrix may hold.
pub trait Number: Copy + Default + Send + Sync {
    /// What it is multiplied with.
    type Row: Copy + Default;
    /// Some numbers in registers.
    type Wide<M: Machine>: Copy;
    /// LANES sums.
    type Sums<M: Machine>: Copy;
    /// How many numbers are multiplied at once.
    const STEP: usize;

    /// The same sum everywhere.
    fn zero<M: Machine>() -> Self::Sums<M>;
    /// STEP numbers of the matrix.
    fn load<M: Machine>(numbers: &[Self]) -> Self::Wide<M>;
    /// STEP numbers of a row.
    fn load_row<M: Machine>(numbers: &[Self::Row]) -> Self::Wide<M>;
    /// sums + a * b.
    fn add<M: Machine>(sums: Self::Sums<M>, a: Self::Wide<M>, b: Self::Wide<M>) -> Self::Sums<M>;
    /// The sum of the sums.
    fn total<M: Machine>(sums: Self::Sums<M>) -> f32;
}

/// What a cache may hold.
pub trait Stored: Number<Row = f32> {
    /// LANES numbers.
    fn floats<M: Machine>(numbers: &[Self]) -> M::Floats;
    /// One number.
    fn wide(self) -> f32;
    /// The nearest of these numbers.
    fn nearest(number: f32) -> Self;
}

macro_rules! floating {
    ($number: ty, $load: ident) => {
        impl Number for $number {
            type Row = f32;
            type Wide<M: Machine> = M::Floats;
            type Sums<M: Machine> = M::Floats;
            const STEP: usize = LANES;

            #[inline(always)]
            fn zero<M: Machine>() -> M::Floats {
                M::splat(0.0)
            }

            #[inline(always)]
            fn load<M: Machine>(numbers: &[Self]) -> M::Floats {
                M::$load(numbers.try_into().expect("STEP numbers"))
            }

            #[inline(always)]
            fn load_row<M: Machine>(numbers: &[f32]) -> M::Floats {
                M::single(numbers.try_into().expect("STEP numbers"))
            }

            #[inline(always)]
            fn add<M: Machine>(sums: M::Floats, a: M::Floats, b: M::Floats) -> M::Floats {
                M::add_products(sums, a, b)
            }

            #[inline(always)]
            fn total<M: Machine>(sums: M::Floats) -> f32 {
                total(M::store(sums))
            }
        }
    };
}

floating!(f32, single);
floating!(u16, half);

impl Number for i8 {
    type Row = i16;
    type Wide<M: Machine> = M::Shorts;
    type Sums<M: Machine> = M::Sums;
    const STEP: usize = 2 * LANES;

    #[inline(always)]
    fn zero<M: Machine>() -> M::Sums {
        M::zero()
    }

    #[inline(always)]
    fn load<M: Machine>(numbers: &[i8]) -> M::Shorts {
        M::bytes(numbers.try_into().expect("STEP numbers"))
    }

    #[inline(always)]
    fn load_row<M: Machine>(numbers: &[i16]) -> M::Shorts {
        M::shorts(numbers.try_into().expect("STEP numbers"))
    }

    #[inline(always)]
    fn add<M: Machine>(sums: M::Sums, a: M::Shorts, b: M::Shorts) -> M::Sums {
        M::add_pairs(sums, a, b)
    }

    #[inline(always)]
    fn total<M: Machine>(sums: M::Sums) -> f32 {
        total(M::store_sums(sums).map(|sum| sum as f32))
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn floats<M: Machine>(numbers: &[f32]) -> M::Floats {
        Self::load::<M>(numbers)
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    #[inline(always)]
    fn nearest(number: f32) -> f32 {
        number
    }
}

impl Stored for u16 {
    #[inline(always)]
    fn floats<M: Machine>(numbers: &[u16]) -> M::Floats {
        Self::load::<M>(numbers)
    }

    #[inline(always)]
    fn wide(self) -> f32 {
        widen(self)
    }

    #[inline(always)]
    fn nearest(number: f32) -> u16 {
        narrow(number)
    }
}

// -- Products ---------------------------------------------------------------------------------------------------------

/// Weights [M,K] and x [N,K] -> out [N,M].
struct Products<'a, W: Number> {
    weights: &'a [W],
    x: &'a [W::Row],
    columns: usize,
    out: &'a mut [f32],
}

impl<'a, W: Number> Products<'a, W> {
    fn run(weights: &'a [W], x: &'a [W::Row], columns: usize, out: &'a mut [f32]) {
        run(Products { weights, x, columns, out })
    }
}

impl<W: Number> Work for Products<'_, W> {
    #[inline(always)]
    fn on<M: Machine>(self) {
        let Products { weights, x, columns, out } = self;
        let (size, count) = (weights.len() / columns, x.len() / columns);
        let whole = size / 4 * 4;
        // four rows of the matrix at once: each number of x that is read serves all of them
        for start in 0..whole / 4 {
            let rows = &weights[start * columns..];
            for n in (0..count).step_by(4) {
                let (x, out) = (&x[n * columns..], &mut out[n * size + start..]);
                match count - n {
                    1 => tile::<W, M, 4, 1>(rows, whole / 4, x, columns, out, size),
                    2 => tile::<W, M, 4, 2>(rows, whole / 4, x, columns, out, size),
                    3 => tile::<W, M, 4, 3>(rows, whole / 4, x, columns, out, size),
                    _ => tile::<W, M, 4, 4>(rows, whole / 4, x, columns, out, size),
                }
            }
        }
        for (r, row) in weights[whole * columns..].chunks_exact(columns).enumerate() {
            for (x, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(size)) {
                tile::<W, M, 1, 1>(row, 0, x, columns, &mut out[whole + r..], size);
            }
        }
    }
}

/// The first R rows of the matrix times the first N rows of x, into the first R columns of out [N,size].
#[inline(always)]
fn tile<W: Number, M: Machine, const R: usize, const N: usize>(
    weights: &[W],
    apart: usize,
    x: &[W::Row],
    columns: usize,
    out: &mut [f32],
    size: usize,
) {
    let weights: [&[W]; R] = std::array::from_fn(|r| &weights[r * apart * columns..][..columns]);
    let x: [&[W::Row]; N] = std::array::from_fn(|n| &x[n * columns..(n + 1) * columns]);
    let mut sums = [[W::zero::<M>(); N]; R];
    let whole = columns / W::STEP * W::STEP;
    for k in (0..whole).step_by(W::STEP) {
        let x: [W::Wide<M>; N] = std::array::from_fn(|n| W::load_row::<M>(&x[n][k..k + W::STEP]));
        for r in 0..R {
            // what follows these rows is read next; without this a core waits for memory half of the time
            if (k * size_of::<W>()).is_multiple_of(64) {
                prefetch(weights[r].as_ptr().wrapping_add(k + columns));
            }
            let weights = W::load::<M>(&weights[r][k..k + W::STEP]);
            for n in 0..N {
                sums[r][n] = W::add::<M>(sums[r][n], x[n], weights);
            }
        }
    }
    if whole < columns {
        for r in 0..R {
            let weights = W::load::<M>(&padded(&weights[r][whole..])[..W::STEP]);
            for n in 0..N {
                let x = W::load_row::<M>(&padded(&x[n][whole..])[..W::STEP]);
                sums[r][n] = W::add::<M>(sums[r][n], x, weights);
            }
        }
    }
    for n in 0..N {
        for r in 0..R {
            out[n * size + r * apart] = W::total::<M>(sums[r][n]);
        }
    }
}

/// The numbers and zeros.
#[inline(always)]
fn padded<T: Copy + Default>(numbers: &[T]) -> [T; 2 * LANES] {
    let mut padded = [T::default(); 2 * LANES];
    padded[..numbers.len()].copy_from_slice(numbers);
    padded
}

/// Ask for a place in memory that will be read soon. It may lie behind the end of the matrix.
#[inline(always)]
fn prefetch<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unsafe_code)]
    // Safety: a prefetch changes nothing that a program could see, and an address that is not there is no error
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// The sum of the lanes, added in pairs.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The nearest whole number; the number's size is below 2^22.
#[inline(always)]
fn nearest(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: numbers of this size have no fraction
    (x + ROUND) - ROUND
}

/// The dot product of a row with itself.
pub fn squares(row: &[f32]) -> f32 {
    let mut sum = [0.0];
    Products::<f32>::run(row, row, row.len(), &mut sum);
    sum[0]
}

// -- Attention --------------------------------------------------------------------------------------------------------

/// Sum of the rows [S,C] with these weights: weights [N,S] -> out [N,C].
struct Sums<'a, W> {
    weights: &'a [f32],
    rows: &'a [W],
    columns: usize,
    out: &'a mut [f32],
}

impl<W: Stored> Work for Sums<'_, W> {
    #[inline(always)]
    fn on<M: Machine>(self) {
        let Sums { weights, rows, columns, out } = self;
        let (size, pieces) = (rows.len() / columns, columns / LANES);
        for (weights, out) in weights.chunks_exact(size).zip(out.chunks_exact_mut(columns)) {
            for start in (0..pieces / 4 * 4).step_by(4) {
                columns_of::<W, M, 4>(weights, rows, columns, start, out);
            }
            for start in pieces / 4 * 4..pieces {
                columns_of::<W, M, 1>(weights, rows, columns, start, out);
            }
            for c in pieces * LANES..columns {
                out[c] =
                    weights.iter().zip(rows.chunks_exact(columns)).map(|(weight, row)| weight * row[c].wide()).sum();
            }
        }
    }
}

/// P pieces of LANES columns, from piece `start` on, of the sum of the rows with these weights.
#[inline(always)]
fn columns_of<W: Stored, M: Machine, const P: usize>(
    weights: &[f32],
    rows: &[W],
    columns: usize,
    start: usize,
    out: &mut [f32],
) {
    let mut sums = [M::splat(0.0); P];
    for (weight, row) in weights.iter().zip(rows.chunks_exact(columns)) {
        for (p, row) in row[start * LANES..(start + P) * LANES].chunks_exact(LANES).enumerate() {
            sums[p] = M::add_products(sums[p], M::splat(*weight), W::floats::<M>(row));
        }
    }
    for (p, out) in out.chunks_exact_mut(LANES).skip(start).take(P).enumerate() {
        out.copy_from_slice(&M::store(sums[p]));
    }
}

/// Attention of some queries [N,C], already divided by sqrt(C), to keys and values [S,C] of one head: out [N,C].
/// scores: room for N * S numbers.
pub fn attend<W: Stored>(
    queries: &[f32],
    keys: &[W],
    values: &[W],
    columns: usize,
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let size = keys.len() / columns;
    scores.clear();
    scores.resize(queries.len() / columns * size, 0.0);
    Products::run(keys, queries, columns, scores);
    for scores in scores.chunks_exact_mut(size) {
        let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        scores.iter_mut().for_each(|score| *score = exp(*score - largest));
        let mass = scores.iter().sum::<f32>();
        scores.iter_mut().for_each(|score| *score /= mass);
    }
    run(Sums { weights: scores, rows: values, columns, out });
}

/// e^x within a few units of the last place, as a polynomial: the same on every machine, and the compiler computes
/// several at once, which it cannot do with calls of a library.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 2^n * e^r with |r| <= ln(2) / 2; ln(2) in two parts, of which the first times n is exact
    let x = x.clamp(-87.0, 88.0);
    let n = nearest(x * std::f32::consts::LOG2_E);
    let r = (x - n * 0.693_145_75) - n * 1.428_606_8e-6;
    let p = 1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0 + r * (1.0 / 720.0))))));
    p * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::run_on_each;
    use std::cell::RefCell;

    /// Numbers between -1 and 1, other ones for every seed.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    /// The product of every machine, checked against sums in f64.
    fn check<W: Number>(
        weights: &[W],
        x: &[W::Row],
        columns: usize,
        wide: impl Fn(W) -> f64,
        row: impl Fn(W::Row) -> f64,
    ) {
        let (size, count) = (weights.len() / columns, x.len() / columns);
        let outs = RefCell::new(Vec::new());
        struct Into<'a, W: Number>(&'a [W], &'a [W::Row], usize, &'a RefCell<Vec<Vec<f32>>>);
        impl<W: Number> Work for Into<'_, W> {
            #[inline(always)]
            fn on<M: Machine>(self) {
                let mut out = vec![f32::NAN; self.0.len() / self.2 * (self.1.len() / self.2)];
                Products { weights: self.0, x: self.1, columns: self.2, out: &mut out }.on::<M>();
                self.3.borrow_mut().push(out);
            }
        }
        run_on_each(|| Into(weights, x, columns, &outs));
        for out in outs.borrow().iter() {
            for n in 0..count {
                for m in 0..size {
                    let pairs = weights[m * columns..][..columns].iter().zip(&x[n * columns..][..columns]);
                    let exact: f64 = pairs.clone().map(|(w, x)| wide(*w) * row(*x)).sum();
                    let bound: f64 = pairs.map(|(w, x)| (wide(*w) * row(*x)).abs()).sum();
                    assert!((f64::from(out[n * size + m]) - exact).abs() <= 1e-6 * bound + 1e-12);
                }
            }
        }
    }

    #[test]
    fn products_are_right_on_every_machine_whatever_is_left_over() {
        for (size, columns) in [(1, 1), (3, 16), (4, 31), (9, 32), (6, 45), (8, 64), (5, 100)] {
            for count in [1, 2, 3, 4, 5, 9, 16, 19] {
                let (weights, x) = (numbers(size * columns, 1), numbers(count * columns, 2));
                check(&weights, &x, columns, f64::from, f64::from);
                let narrow: Vec<u16> = weights.iter().map(|w| narrow(*w)).collect();
                check(&narrow, &x, columns, |w| f64::from(widen(w)), f64::from);
                let bytes: Vec<i8> = weights.iter().map(|w| (w * 127.0) as i8).collect();
                let whole: Vec<i16> = x.iter().map(|x| (x * 32767.0) as i16).collect();
                check(&bytes, &whole, columns, f64::from, f64::from);
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_among_others() {
        let (size, columns, count) = (13, 50, 19);
        let (weights, x) = (numbers(size * columns, 1), numbers(count * columns, 2));
        let narrow: Vec<u16> = weights.iter().map(|w| narrow(*w)).collect();
        for matrix in [Matrix::Single(&weights), Matrix::Half(&narrow)] {
            let product = |x: &[f32]| {
                let mut rows = Rows { numbers: x.to_vec(), ..Rows::default() };
                rows.set(columns, Some(&matrix));
                let mut out = vec![f32::NAN; rows.count() * size];
                matrix.multiply(&rows, 0..size, &mut out);
                out
            };
            let alone: Vec<f32> = x.chunks_exact(columns).flat_map(product).collect();
            assert_eq!(product(&x), alone);
        }
    }

    #[test]
    fn whole_numbers_never_overflow() {
        for (columns, number) in [(16, 3.0), (4096, 3.0), (8192, 3.0), (16_384, 3.0), (16_384, -3.0), (100_000, -3.0)] {
            let scales = [1.0];
            let matrix = vec![-128i8; columns];
            let matrix = Matrix::Quarter(&matrix, &scales);
            let mut x = Rows { numbers: vec![number; columns], ..Rows::default() };
            x.set(columns, Some(&matrix));
            let mut out = [0.0];
            matrix.multiply(&x, 0..1, &mut out);
            let exact = -128.0 * number * columns as f32;
            assert!((out[0] / exact - 1.0).abs() < 1e-3, "{} instead of {exact}", out[0]);
        }
    }

    #[test]
    fn what_is_no_number_stays_so() {
        for odd in [f32::NAN, f32::INFINITY] {
            let mut x = Rows { numbers: vec![1.0, odd, 2.0], ..Rows::default() };
            let matrix = Matrix::Quarter(&[1, 1, 1], &[1.0]);
            x.set(3, Some(&matrix));
            let mut out = [0.0];
            matrix.multiply(&x, 0..1, &mut out);
            assert!(out[0].is_nan());
        }
    }

    #[test]
    fn rows_of_any_size_keep_their_numbers() {
        let matrix: Vec<i8> = (0..64).map(|k| k - 32).collect();
        let matrix = Matrix::Quarter(&matrix, &[0.5]);
        let row = numbers(64, 3);
        for size in [1e-20f32, 1.0, 1e20] {
            // beside a row of large ones, and one of nothing
            let mut x: Vec<f32> = row.iter().map(|x| x * size).collect();
            x.extend(vec![1e30; 64]);
            x.extend(vec![0.0; 64]);
            let mut x = Rows { numbers: x, ..Rows::default() };
            x.set(64, Some(&matrix));
            assert_eq!(x.count(), 3);
            let mut out = [0.0; 3];
            matrix.multiply(&x, 0..1, &mut out);
            let exact: f32 = row.iter().zip(-32..).map(|(x, w)| x * w as f32 * 0.5).sum();
            assert!((out[0] / size - exact).abs() < 4e-3 && out[2] == 0.0);
        }
    }

    #[test]
    fn attention_is_a_mean_by_likelihood() {
        for columns in [6, 16, 80] {
            let (count, size) = (2, 5);
            let queries = numbers(count * columns, 4);
            let (keys, values) = (numbers(size * columns, 5), numbers(size * columns, 6));
            let (mut scores, mut out) = (vec![7.0], vec![f32::NAN; count * columns]);
            attend(&queries, &keys, &values, columns, &mut scores, &mut out);
            for n in 0..count {
                let dot = |s: usize| -> f64 {
                    let pairs = queries[n * columns..][..columns].iter().zip(&keys[s * columns..]);
                    pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                };
                let likely: Vec<f64> = (0..size).map(|s| dot(s).exp()).collect();
                for c in 0..columns {
                    let sum: f64 = (0..size).map(|s| likely[s] * f64::from(values[s * columns + c])).sum();
                    let exact = sum / likely.iter().sum::<f64>();
                    assert!((f64::from(out[n * columns + c]) - exact).abs() < 1e-6);
                }
            }
        }
        // scores beyond what e^x can hold
        let mut out = [0.0; 1];
        attend(&[1000.0], &[1.0, 2.0, -5.0], &[3.0, 4.0, 5.0], 1, &mut Vec::new(), &mut out);
        assert_eq!(out, [4.0]);
    }

    #[test]
    fn exp_is_exact_to_a_few_units_of_the_last_place() {
        for step in -8700..=8800 {
            let x = step as f32 / 100.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3e-7, "e^{x}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(0.0) == 1.0);
    }
}
