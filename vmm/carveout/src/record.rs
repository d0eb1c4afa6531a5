//! A guest's record: its saved state, and what is needed to run it from that under another kernel.
//!
//! ```text
//!  0        64       128            4096
//!  | mark   | header | (nothing)    | label (JSON) | CPUID | saved state |
//! ```
//!
//! The order of writing is what makes it sound: the mark is set to *empty*, then body and header are
//! written, and only when all of it is out the mark says *stored*. Pure: bytes to values and back.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use stillpoint_control::report::{ReleaseName, SwapReport};

use crate::layout::{self, ALIGN};

/// Where the mark lies.
pub const MARK_AT: u64 = 0;
/// Where the header lies.
pub const HEADER_AT: u64 = 64;
/// Where the body lies.
pub const BODY_AT: u64 = 4096;
/// Bytes of a header.
pub const HEADER: usize = 64;
const MAGIC: [u8; 8] = *b"STLPREC\x01";

/// Bytes of a machine's record, for its room: the state of a vCPU is some 7 KiB, at most 12 with the
/// largest of x86's register files, and the rest is the console's buffer and devices.
pub fn room(vcpus: u8) -> u64 {
    layout::rounded(ALIGN + u64::from(vcpus) * (32 << 10))
}

/// What is said of the state beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// The jump that it was stored for.
    pub nonce: String,
    /// Id of the swap.
    pub swap: String,
    /// The machine's spec, as JSON.
    pub spec: String,
    /// The release that wrote the state.
    pub release: ReleaseName,
    /// Format of the state.
    pub format: u32,
    /// Frequency of the guest's TSC, kHz.
    pub tsc_khz: u32,
    /// TSC offset of vCPU 0, where KVM tells one.
    pub tsc_offset: Option<i64>,
    /// The guest's clocks leave the pause out.
    pub hold: bool,
    /// Host TSC at the kick: the blackout began here.
    pub kicked_tsc: u64,
    /// Swaps that the guest had lived through.
    pub swaps: u64,
    /// The report as far as it goes.
    pub report: SwapReport,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What is said of it.
    pub label: Label,
    /// CPUID entries, as the VMM wrote them.
    pub cpuid: Vec<u8>,
    /// Saved state, as the VMM wrote it.
    pub state: Vec<u8>,
}

/// Why there is no record to be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It doesn't fit.
    #[error("the record is {len} bytes, and has room for {room}")]
    TooLarge {
        /// Its length.
        len: u64,
        /// Its room.
        room: u64,
    },
    /// There is none, or it is not whole.
    #[error("its record is damaged ({0})")]
    Damaged(String),
}

/// What a header says of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    label: u32,
    cpuid: u32,
    state: u32,
    digest: [u8; 32],
}

impl Header {
    /// From its bytes; the body they speak of fits into a record of `room` bytes.
    pub fn decode(bytes: &[u8; HEADER], room: u64) -> Result<Self, RecordError> {
        let damaged = |why: &str| RecordError::Damaged(why.to_owned());
        let (magic, rest) = bytes.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(damaged("there is none"));
        }
        let word = |at: usize| {
            let bytes = rest[at..at + 4].try_into().unwrap_or([0; 4]);
            u32::from_le_bytes(bytes)
        };
        let header = Self {
            label: word(0),
            cpuid: word(4),
            state: word(8),
            digest: rest[12..44].try_into().unwrap_or([0; 32]),
        };
        match BODY_AT + header.body_len() as u64 {
            len if len > room => Err(damaged("a length beyond its room")),
            _ => Ok(header),
        }
    }

    /// Bytes of the body.
    pub fn body_len(&self) -> usize {
        // Three of 32 bits: no overflow where this runs.
        self.label as usize + self.cpuid as usize + self.state as usize
    }

    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&MAGIC);
        for (at, word) in [(8, self.label), (12, self.cpuid), (16, self.state)] {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[20..52].copy_from_slice(&self.digest);
        bytes
    }

    fn digest_of(lens: [u32; 3], body: &[u8]) -> [u8; 32] {
        let mut hasher = Sha256::new();
        for len in lens {
            hasher.update(len.to_le_bytes());
        }
        hasher.update(body);
        hasher.finalize().into()
    }
}

impl Record {
    /// As header and body, for a record of `room` bytes.
    pub fn encode(&self, room: u64) -> Result<([u8; HEADER], Vec<u8>), RecordError> {
        let label = serde_json::to_vec(&self.label).unwrap_or_default();
        let parts: [&[u8]; 3] = [&label, &self.cpuid, &self.state];
        let body = parts.concat();
        let len = BODY_AT + body.len() as u64;
        if len > room {
            return Err(RecordError::TooLarge { len, room });
        }
        let lens = parts.map(|part| u32::try_from(part.len()).unwrap_or(u32::MAX));
        let [label, cpuid, state] = lens;
        let header = Header {
            label,
            cpuid,
            state,
            digest: Header::digest_of(lens, &body),
        };
        Ok((header.encode(), body))
    }

    /// From a header and the body it speaks of.
    pub fn decode(header: &Header, body: &[u8]) -> Result<Self, RecordError> {
        let damaged = |why: &str| RecordError::Damaged(why.to_owned());
        let lens = [header.label, header.cpuid, header.state];
        if body.len() != header.body_len() {
            return Err(damaged("cut off"));
        }
        if Header::digest_of(lens, body) != header.digest {
            return Err(damaged("its digest is another"));
        }
        let (label, rest) = body.split_at(header.label as usize);
        let (cpuid, state) = rest.split_at(header.cpuid as usize);
        let label = serde_json::from_slice(label);
        Ok(Self {
            label: label.map_err(|e| RecordError::Damaged(e.to_string()))?,
            cpuid: cpuid.to_vec(),
            state: state.to_vec(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use stillpoint_control::report::{Blackout, Outcome};

    use super::*;

    pub(crate) fn record() -> Record {
        let report = SwapReport {
            swap: "k1".into(),
            vm: "a".into(),
            component: "kernel".into(),
            from: ReleaseName::default(),
            to: ReleaseName::default(),
            outcome: Outcome::Moved,
            reason: None,
            started_at_unix_ns: 1,
            vcpus: 2,
            memory_bytes: 64 << 20,
            state_format: 3,
            state_bytes: 5,
            budget: Duration::from_secs(30),
            margin: None,
            phases: Vec::new(),
            blackout: Blackout::default(),
            clock: None,
            recovery: Vec::new(),
            warnings: Vec::new(),
        };
        let label = Label {
            nonce: "n".into(),
            swap: "k1".into(),
            spec: "{}".into(),
            release: ReleaseName::default(),
            format: 3,
            tsc_khz: 2_000_000,
            tsc_offset: Some(-5),
            hold: false,
            kicked_tsc: 77,
            swaps: 1,
            report,
        };
        Record {
            label,
            cpuid: vec![1, 2, 3],
            state: vec![9; 300],
        }
    }

    #[test]
    fn it_comes_back_as_it_was() {
        let written = record();
        let (header, body) = written.encode(ALIGN).expect("it fits");
        let header = Header::decode(&header, ALIGN).expect("a header");
        assert_eq!(Record::decode(&header, &body), Ok(written));
    }

    #[test]
    fn a_byte_that_changed_is_seen_wherever_it_is() {
        let (good, body) = record().encode(ALIGN).expect("it fits");
        // What lies behind the digest says nothing.
        for at in 0..52 {
            let mut header = good;
            header[at] ^= 1;
            let read =
                Header::decode(&header, ALIGN).and_then(|header| Record::decode(&header, &body));
            assert!(matches!(read, Err(RecordError::Damaged(_))), "header {at}");
        }
        let header = Header::decode(&good, ALIGN).expect("a header");
        for at in 0..body.len() {
            let mut body = body.clone();
            body[at] ^= 1;
            Record::decode(&header, &body).expect_err("another digest");
        }
        Record::decode(&header, &body[1..]).expect_err("cut off");
    }

    #[test]
    fn one_that_is_too_large_is_refused_on_both_sides() {
        let mut large = record();
        large.state = vec![0; 1 << 20];
        let error = large.encode(1 << 20).expect_err("no room");
        assert!(matches!(error, RecordError::TooLarge { .. }), "{error}");
        let (header, _) = large.encode(ALIGN).expect("room");
        Header::decode(&header, 1 << 20).expect_err("beyond its room");
        assert_eq!((room(1), room(254)), (4 << 20, 10 << 20));
    }
}
