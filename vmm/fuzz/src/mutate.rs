//! The bounded run: a mutator with a seed, and no feedback. It is no match for libFuzzer, and needs
//! nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use stillpoint_state::golden::to_text;

use crate::Target;

/// The longest input.
const LONGEST: usize = 64 << 10;

/// Runs a target for so long; whether there was no finding. One is printed, with its bytes.
pub fn run(target: &Target, seed: u64, time: Duration) -> bool {
    let mut random = fastrand::Rng::with_seed(seed);
    let corpus = (target.corpus)();
    let (began, mut count) = (Instant::now(), 0_u64);
    while began.elapsed() < time {
        let bytes = mutated(&corpus, &mut random);
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&bytes))).is_err() {
            println!("{}: a finding, input {count} of seed {seed}:", target.name);
            println!("{}", to_text(target.name, &bytes));
            return false;
        }
        count += 1;
    }
    println!("{:<14} {count:>9} inputs, no finding", target.name);
    true
}

/// One of the corpus, with a few things changed that tend to matter.
fn mutated(corpus: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    let any = |random: &mut fastrand::Rng| corpus[random.usize(..corpus.len())].clone();
    let mut bytes = any(random);
    for _ in 0..random.usize(1..8) {
        if bytes.is_empty() {
            return bytes;
        }
        let at = random.usize(..bytes.len());
        let to = (at + random.usize(1..64)).min(bytes.len());
        match random.u8(..9) {
            0 => bytes[at] ^= 1 << random.u8(..8),
            1 => {
                bytes[at] = *[0, 1, 0x7f, 0x80, 0xff]
                    .get(random.usize(..5))
                    .unwrap_or(&0)
            }
            2 => bytes[at] = random.u8(..),
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..to)),
            5 => {
                let part = bytes[at..to].to_vec();
                let times = random.usize(1..64);
                bytes.splice(at..at, part.repeat(times));
            }
            6 => bytes[at..to].fill(random.u8(..)),
            7 => {
                let other = any(random);
                let from = random.usize(..other.len().max(1));
                bytes.truncate(at);
                bytes.extend(other.get(from..).unwrap_or_default());
            }
            _ => {
                // A length or an address.
                let value = random.u64(..) >> random.u32(..64);
                let width = to - at;
                let value = value.to_le_bytes();
                bytes[at..to][..width.min(8)].copy_from_slice(&value[..width.min(8)]);
            }
        }
        bytes.truncate(LONGEST);
    }
    bytes
}
