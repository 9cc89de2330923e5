//! Decoding for MiniLLM: one step of a dense Qwen3 model on a CPU, in one call.
//!
//! * [`vectors`] has sixteen numbers at once, in the instructions of this processor;
//! * [`products`] multiplies few rows with a matrix in fp32, bf16 or int8;
//! * [`team`] lets threads do many short things together;
//! * [`step`] makes a forward of these.
//!
//! At one token a step a small model spends more time on calling functions than on arithmetic; and the products that
//! libraries offer for one row do not read weights as fast as memory gives them. Here is one call, and products that
//! do. None of these modules knows Python: `py` is the border. The slow twin is `model.Transformer`; the tests hold one
//! against the other.

#![warn(missing_docs)]
#![deny(unsafe_code)] // but for the two places that say why

pub mod products;
#[cfg(feature = "python")]
mod py;
pub mod step;
pub mod team;
pub mod vectors;
