//! What a section's bytes hold, field by field, beside what was read of them.
//!
//! Protobuf skips a field that it does not know. In guest state that would be a loss nobody sees, so
//! it is looked for: a section that was read whole is as long, written again, as it was. A field at
//! its default is never written, so a later release may add one, and older ones read its state as
//! long as the field says no more than "as before".
//!
//! Fields from [`REMARKS`] on are the exception: a section may have them beside its state, they say
//! nothing that a guest could miss, and who does not know them goes past them.

use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use crate::codec::Section;

/// The most messages, strings and byte strings in one section. An empty message is two bytes in a
/// section and a hundred in memory: without a limit a state could ask for fifty times its size.
pub const MAX_PARTS: usize = 4096;
/// The first number of fields that may be skipped. Never inside of a field that may not.
pub const REMARKS: u32 = 1000;
/// Messages in messages are looked into so deep.
const DEPTH: usize = 8;

/// One field: its number, its value as it is on the wire, and both together.
struct Field<'b> {
    number: u32,
    kind: WireType,
    value: &'b [u8],
    whole: &'b [u8],
}

/// The next field. `None` at the end, and before what is no field: decoding says what is wrong with it.
fn next<'b>(rest: &mut &'b [u8]) -> Option<Field<'b>> {
    let all = *rest;
    let (number, kind) = decode_key(rest).ok()?;
    let len = match kind {
        WireType::Varint => {
            let before = rest.len();
            let mut ahead = *rest;
            decode_varint(&mut ahead).ok()?;
            before - ahead.len()
        }
        WireType::SixtyFourBit => 8,
        WireType::ThirtyTwoBit => 4,
        WireType::LengthDelimited => usize::try_from(decode_varint(rest).ok()?).ok()?,
        WireType::StartGroup | WireType::EndGroup => return None,
    };
    let value = rest.get(..len)?;
    *rest = &rest[len..];
    Some(Field {
        number,
        kind,
        value,
        whole: &all[..all.len() - rest.len()],
    })
}

/// Whether a section is within bounds, before anything is made of it; how many bytes of it are remarks.
pub(crate) fn judge(body: &[u8], most: usize) -> Result<usize, String> {
    if body.len() > most {
        let len = body.len();
        return Err(format!(
            "it has {len} bytes, and none of ours more than {most}"
        ));
    }
    let (mut rest, mut parts, mut remarks) = (body, 0, 0);
    while let Some(field) = next(&mut rest) {
        parts += usize::from(field.kind == WireType::LengthDelimited);
        if parts > MAX_PARTS {
            return Err(format!("it has more than {MAX_PARTS} parts"));
        }
        if field.number >= REMARKS {
            remarks += field.whole.len();
        }
    }
    Ok(remarks)
}

/// The first field of a section that reading it loses, as `9` or, within field 9, as `9.12`.
pub(crate) fn lost<S: Section>(body: &[u8]) -> Option<String> {
    let again = |bytes: &[u8]| S::decode(bytes).ok().map(|section| section.encode_to_vec());
    let path = lost_in(body, &again, 0)?;
    let numbers: Vec<_> = path.iter().map(u32::to_string).collect();
    Some(numbers.join("."))
}

/// `again` gives what is left of some fields when they were read and written.
fn lost_in(
    body: &[u8],
    again: &dyn Fn(&[u8]) -> Option<Vec<u8>>,
    depth: usize,
) -> Option<Vec<u32>> {
    let mut rest = body;
    while let Some(field) = next(&mut rest) {
        if depth == 0 && field.number >= REMARKS {
            continue;
        }
        let kept = again(field.whole)?;
        if kept.len() == field.whole.len() {
            continue;
        }
        let mut path = vec![field.number];
        if !kept.is_empty() && field.kind == WireType::LengthDelimited && depth < DEPTH {
            // Known, and something within it is not.
            let within = |inner: &[u8]| {
                let kept = again(&wrapped(field.number, inner))?;
                next(&mut kept.as_slice()).map(|field| field.value.to_vec())
            };
            path.extend(lost_in(field.value, &within, depth + 1).unwrap_or_default());
        }
        return Some(path);
    }
    None
}

/// A message as a field of another.
pub(crate) fn wrapped(number: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(value.len() + 16);
    encode_key(number, WireType::LengthDelimited, &mut bytes);
    encode_varint(value.len() as u64, &mut bytes);
    bytes.extend_from_slice(value);
    bytes
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::codec::{Saved, StateError, Unclaimed};
    use crate::contents::Added;
    use crate::sections::{VirtioBlk, VirtioMmio, VirtioQueue};

    /// A disk of a later release.
    #[derive(Clone, PartialEq, Message)]
    struct LaterBlk {
        #[prost(uint64, tag = "1")]
        size: u64,
        #[prost(bool, tag = "2")]
        write_back: bool,
        #[prost(uint32, tag = "3")]
        sectors_frozen: u32,
        #[prost(string, tag = "1000")]
        remark: String,
    }

    impl Section for LaterBlk {
        const NAME: &'static str = VirtioBlk::NAME;
        const VERSION: u32 = 1;
        const MOST: usize = 4096;
        const ADDED: &'static [Added] = &[];
    }

    #[derive(Clone, PartialEq, Message)]
    struct LaterQueue {
        #[prost(uint32, tag = "1")]
        size: u32,
        #[prost(uint64, tag = "3")]
        desc: u64,
        #[prost(fixed64, tag = "9")]
        reset: u64,
    }

    #[derive(Clone, PartialEq, Message)]
    struct LaterMmio {
        #[prost(uint32, tag = "1")]
        device_type: u32,
        #[prost(message, repeated, tag = "9")]
        queues: Vec<LaterQueue>,
    }

    impl Section for LaterMmio {
        const NAME: &'static str = VirtioMmio::NAME;
        const VERSION: u32 = 1;
        const MOST: usize = 4096;
        const ADDED: &'static [Added] = &[];
    }

    fn read<S: Section>(instance: &str, section: &impl Section) -> Result<S, StateError> {
        let mut saved = Saved::default();
        saved.put(instance, section).expect("put");
        let bytes = saved.finish(3, "9.0.0", "x", 0);
        Unclaimed::decode(&bytes).expect("decode").take(instance)
    }

    #[test]
    fn a_field_that_says_something_is_refused_by_its_number() {
        let mut later = LaterBlk {
            size: 1 << 30,
            write_back: true,
            ..LaterBlk::default()
        };
        // At its default, it is not there.
        let read_again: VirtioBlk = read("disk0", &later).expect("as before");
        assert_eq!(read_again.size, 1 << 30);
        later.sectors_frozen = 7;
        let error = read::<VirtioBlk>("disk0", &later).expect_err("a field more");
        let (section, field) = ("virtio-blk/disk0".into(), "3".into());
        assert_eq!(error, StateError::Field { section, field });
    }

    #[test]
    fn a_remark_is_passed_over_and_hides_nothing() {
        let mut later = LaterBlk {
            size: 5,
            remark: "written on a Friday".into(),
            ..LaterBlk::default()
        };
        let disk: VirtioBlk = read("disk0", &later).expect("no more than a remark");
        assert_eq!(disk.size, 5);
        later.sectors_frozen = 1;
        assert!(matches!(
            read::<VirtioBlk>("disk0", &later),
            Err(StateError::Field { .. })
        ));
        // Who knows its own remarks reads them.
        later.sectors_frozen = 0;
        assert_eq!(read::<LaterBlk>("disk0", &later), Ok(later));
    }

    #[test]
    fn a_field_within_a_field_is_found() {
        let queue = |reset| LaterQueue {
            size: 256,
            desc: 1 << 40,
            reset,
        };
        let mut later = LaterMmio {
            device_type: 2,
            queues: vec![queue(0), queue(0)],
        };
        let mmio: VirtioMmio = read("disk0", &later).expect("as before");
        let known = VirtioQueue {
            size: 256,
            desc: 1 << 40,
            ..VirtioQueue::default()
        };
        assert_eq!(mmio.queues, [known, known]);
        later.queues[1].reset = 1;
        let error = read::<VirtioMmio>("disk0", &later).expect_err("a field more");
        let (section, field) = ("virtio-mmio/disk0".into(), "9.9".into());
        assert_eq!(error, StateError::Field { section, field });
    }
}
