//! Many numbers at once, with the widest instructions that the processor has.
//!
//! The compiler makes such instructions of plain loops, but not of loops as deep as a product of matrices needs. So
//! there is a [`Machine`] for each kind of processor, and work that is written once for all of them.

/// Numbers that are added up beside each other in a dot product.
pub const LANES: usize = 16;

/// What a processor can do at once. Sums have LANES parts on all of them.
pub trait Machine {
    /// LANES numbers in f32.
    type Floats: Copy;
    /// LANES whole numbers of 32 bits.
    type Sums: Copy;
    /// 2 * LANES whole numbers of 16 bits.
    type Shorts: Copy;

    /// The same number everywhere.
    fn splat(number: f32) -> Self::Floats;
    /// Numbers as they are.
    fn single(numbers: &[f32; LANES]) -> Self::Floats;
    /// From bf16, the upper half of an f32.
    fn half(numbers: &[u16; LANES]) -> Self::Floats;
    /// sums + a * b, rounded once where there is an instruction for it.
    fn add_products(sums: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Back into memory.
    fn store(floats: Self::Floats) -> [f32; LANES];

    /// All 0.
    fn zero() -> Self::Sums;
    /// Numbers as they are.
    fn shorts(numbers: &[i16; 2 * LANES]) -> Self::Shorts;
    /// From 8 bits.
    fn bytes(numbers: &[i8; 2 * LANES]) -> Self::Shorts;
    /// Sum i grows by a[2 i] * b[2 i] + a[2 i + 1] * b[2 i + 1].
    fn add_pairs(sums: Self::Sums, a: Self::Shorts, b: Self::Shorts) -> Self::Sums;
    /// Back into memory.
    fn store_sums(sums: Self::Sums) -> [i32; LANES];
}

/// Work that is written once for all machines.
pub trait Work {
    /// Do it. Must be inlined, to be made of the instructions of its machine.
    fn on<M: Machine>(self);
}

/// Do the work on the best machine that this processor is.
#[inline]
pub fn run(work: impl Work) {
    #[cfg(target_arch = "x86_64")]
    return x86::run(work);
    #[cfg(not(target_arch = "x86_64"))]
    work.on::<Portable>()
}

/// Do the same work on every machine that this processor is.
#[cfg(test)]
pub fn run_on_each<W: Work>(mut work: impl FnMut() -> W) {
    work().on::<Portable>();
    #[cfg(target_arch = "x86_64")]
    x86::run_on_each(work);
}

/// bf16 as f32.
#[inline(always)]
pub fn widen(number: u16) -> f32 {
    f32::from_bits((number as u32) << 16)
}

/// The nearest bf16; of two equally near ones that with an even last digit.
#[inline(always)]
pub fn narrow(number: f32) -> u16 {
    let bits = number.to_bits();
    if number.is_nan() {
        return (bits >> 16) as u16 | 0x40; // or rounding might make an infinity of it
    }
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

/// Any processor.
pub struct Portable;

impl Machine for Portable {
    type Floats = [f32; LANES];
    type Sums = [i32; LANES];
    type Shorts = [i16; 2 * LANES];

    #[inline(always)]
    fn splat(number: f32) -> Self::Floats {
        [number; LANES]
    }

    #[inline(always)]
    fn single(numbers: &[f32; LANES]) -> Self::Floats {
        *numbers
    }

    #[inline(always)]
    fn half(numbers: &[u16; LANES]) -> Self::Floats {
        numbers.map(widen)
    }

    #[inline(always)]
    fn add_products(mut sums: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        for (sum, (a, b)) in sums.iter_mut().zip(a.into_iter().zip(b)) {
            // where there is no such instruction, `mul_add` calls a function that is many times slower
            *sum = if cfg!(target_arch = "aarch64") { a.mul_add(b, *sum) } else { a * b + *sum };
        }
        sums
    }

    #[inline(always)]
    fn store(floats: Self::Floats) -> [f32; LANES] {
        floats
    }

    #[inline(always)]
    fn zero() -> Self::Sums {
        [0; LANES]
    }

    #[inline(always)]
    fn shorts(numbers: &[i16; 2 * LANES]) -> Self::Shorts {
        *numbers
    }

    #[inline(always)]
    fn bytes(numbers: &[i8; 2 * LANES]) -> Self::Shorts {
        numbers.map(i16::from)
    }

    #[inline(always)]
    fn add_pairs(mut sums: Self::Sums, a: Self::Shorts, b: Self::Shorts) -> Self::Sums {
        for (lane, sum) in sums.iter_mut().enumerate() {
            let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
            *sum += product(2 * lane) + product(2 * lane + 1);
        }
        sums
    }

    #[inline(always)]
    fn store_sums(sums: Self::Sums) -> [i32; LANES] {
        sums
    }
}

/// Safety of every block here: run() alone names these machines, after it has asked the processor whether it is one;
/// and the references are to as many numbers as are read or written.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod x86 {
    use super::{Machine, Portable, Work, LANES};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f,avx512bw")]
    fn on_512(work: impl Work) {
        work.on::<Avx512>()
    }

    #[target_feature(enable = "avx2,fma")]
    fn on_256(work: impl Work) {
        work.on::<Avx2>()
    }

    fn is_512() -> bool {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
    }

    fn is_256() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
    }

    #[inline]
    pub fn run(work: impl Work) {
        if is_512() {
            unsafe { on_512(work) }
        } else if is_256() {
            unsafe { on_256(work) }
        } else {
            work.on::<Portable>()
        }
    }

    #[cfg(test)]
    pub fn run_on_each<W: Work>(mut work: impl FnMut() -> W) {
        if is_256() {
            unsafe { on_256(work()) }
        }
        if is_512() {
            unsafe { on_512(work()) }
        }
    }

    /// Registers of 512 bits.
    pub struct Avx512;

    impl Machine for Avx512 {
        type Floats = __m512;
        type Sums = __m512i;
        type Shorts = __m512i;

        #[inline(always)]
        fn splat(number: f32) -> __m512 {
            unsafe { _mm512_set1_ps(number) }
        }

        #[inline(always)]
        fn single(numbers: &[f32; LANES]) -> __m512 {
            unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
        }

        #[inline(always)]
        fn half(numbers: &[u16; LANES]) -> __m512 {
            unsafe {
                let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(numbers.as_ptr().cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
            }
        }

        #[inline(always)]
        fn add_products(sums: __m512, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, sums) }
        }

        #[inline(always)]
        fn store(floats: __m512) -> [f32; LANES] {
            let mut numbers = [0.0; LANES];
            unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), floats) };
            numbers
        }

        #[inline(always)]
        fn zero() -> __m512i {
            unsafe { _mm512_setzero_si512() }
        }

        #[inline(always)]
        fn shorts(numbers: &[i16; 2 * LANES]) -> __m512i {
            unsafe { _mm512_loadu_si512(numbers.as_ptr().cast()) }
        }

        #[inline(always)]
        fn bytes(numbers: &[i8; 2 * LANES]) -> __m512i {
            unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(numbers.as_ptr().cast())) }
        }

        #[inline(always)]
        fn add_pairs(sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
            unsafe { _mm512_add_epi32(sums, _mm512_madd_epi16(a, b)) }
        }

        #[inline(always)]
        fn store_sums(sums: __m512i) -> [i32; LANES] {
            let mut numbers = [0; LANES];
            unsafe { _mm512_storeu_si512(numbers.as_mut_ptr().cast(), sums) };
            numbers
        }
    }

    /// Registers of 256 bits, two for what LANES numbers need.
    pub struct Avx2;

    impl Machine for Avx2 {
        type Floats = [__m256; 2];
        type Sums = [__m256i; 2];
        type Shorts = [__m256i; 2];

        #[inline(always)]
        fn splat(number: f32) -> Self::Floats {
            unsafe { [_mm256_set1_ps(number); 2] }
        }

        #[inline(always)]
        fn single(numbers: &[f32; LANES]) -> Self::Floats {
            unsafe { [_mm256_loadu_ps(numbers.as_ptr()), _mm256_loadu_ps(numbers[8..].as_ptr())] }
        }

        #[inline(always)]
        fn half(numbers: &[u16; LANES]) -> Self::Floats {
            unsafe {
                let wide = |part: &[u16]| {
                    let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(part.as_ptr().cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
                };
                [wide(&numbers[..8]), wide(&numbers[8..])]
            }
        }

        #[inline(always)]
        fn add_products(sums: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
            unsafe { [_mm256_fmadd_ps(a[0], b[0], sums[0]), _mm256_fmadd_ps(a[1], b[1], sums[1])] }
        }

        #[inline(always)]
        fn store(floats: Self::Floats) -> [f32; LANES] {
            let mut numbers = [0.0; LANES];
            unsafe {
                _mm256_storeu_ps(numbers.as_mut_ptr(), floats[0]);
                _mm256_storeu_ps(numbers[8..].as_mut_ptr(), floats[1]);
            }
            numbers
        }

        #[inline(always)]
        fn zero() -> Self::Sums {
            unsafe { [_mm256_setzero_si256(); 2] }
        }

        #[inline(always)]
        fn shorts(numbers: &[i16; 2 * LANES]) -> Self::Shorts {
            unsafe {
                let load = |part: &[i16]| _mm256_loadu_si256(part.as_ptr().cast());
                [load(&numbers[..16]), load(&numbers[16..])]
            }
        }

        #[inline(always)]
        fn bytes(numbers: &[i8; 2 * LANES]) -> Self::Shorts {
            unsafe {
                let load = |part: &[i8]| _mm256_cvtepi8_epi16(_mm_loadu_si128(part.as_ptr().cast()));
                [load(&numbers[..16]), load(&numbers[16..])]
            }
        }

        #[inline(always)]
        fn add_pairs(sums: Self::Sums, a: Self::Shorts, b: Self::Shorts) -> Self::Sums {
            unsafe {
                [
                    _mm256_add_epi32(sums[0], _mm256_madd_epi16(a[0], b[0])),
                    _mm256_add_epi32(sums[1], _mm256_madd_epi16(a[1], b[1])),
                ]
            }
        }

        #[inline(always)]
        fn store_sums(sums: Self::Sums) -> [i32; LANES] {
            let mut numbers = [0; LANES];
            unsafe {
                _mm256_storeu_si256(numbers.as_mut_ptr().cast(), sums[0]);
                _mm256_storeu_si256(numbers[8..].as_mut_ptr().cast(), sums[1]);
            }
            numbers
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_numbers_are_the_nearest_ones() {
        for bits in 0..=u16::MAX {
            let number = widen(bits);
            assert!(narrow(number) == bits || number.is_nan() && widen(narrow(number)).is_nan());
            if number.is_finite() && widen(bits + 1).is_finite() {
                // a little less and a little more than half way, and half way itself
                let half = f32::from_bits((u32::from(bits) << 16) + 0x8000);
                assert_eq!(narrow(f32::from_bits(half.to_bits() - 1)), bits);
                assert_eq!(narrow(f32::from_bits(half.to_bits() + 1)), bits + 1);
                assert_eq!(narrow(half), bits + bits % 2);
            }
        }
        assert!(widen(narrow(f32::from_bits(0x7F80_0001))).is_nan() && widen(narrow(f32::MAX)).is_infinite());
    }
}
