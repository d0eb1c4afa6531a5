//! The container: header first, then named sections.

use std::marker::PhantomData;

use prost::Message;

use crate::contents::Added;
use crate::fields;

/// First bytes of saved state.
pub const MAGIC: [u8; 8] = *b"SPSTATE\0";
/// The largest saved state that is read, bytes: 254 vCPUs with 64 KiB of XSAVE each fit well.
pub const MAX_STATE: usize = 64 << 20;
/// The most sections that are read.
pub const MAX_SECTIONS: usize = 4096;
pub use crate::fields::MAX_PARTS;

/// What can be known without decoding the rest.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Header {
    /// Which set of section versions follows.
    #[prost(uint32, tag = "1")]
    pub format: u32,
    /// Release that wrote it.
    #[prost(string, tag = "2")]
    pub writer: String,
    /// Name of the machine.
    #[prost(string, tag = "3")]
    pub vm: String,
    /// Handover attempt it was written for (`ownership::Epoch`).
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// Number of sections.
    #[prost(uint32, tag = "5")]
    pub sections: u32,
    /// Bytes of all sections together.
    #[prost(uint64, tag = "6")]
    pub body_len: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct RawSection {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    instance: String,
    #[prost(uint32, tag = "3")]
    version: u32,
    #[prost(bytes = "vec", tag = "4")]
    body: Vec<u8>,
}

/// One kind of saved section.
pub trait Section: Message + Default {
    /// Never reused, never renamed once released.
    const NAME: &'static str;
    /// The newest version this build reads; raised only if an old reader would misread a new one.
    const VERSION: u32;
    /// The most bytes one may have: more than any machine of ours needs.
    const MOST: usize;
    /// Fields that came to `VERSION` after its first release, and that no machine with such a
    /// section has at their defaults: who doesn't know them can't read what we write.
    const ADDED: &'static [Added];
}

/// Why saved state could not be written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// Not saved state at all, or cut off.
    #[error("saved state: {0}")]
    Container(&'static str),
    /// Bytes that are no protobuf of the expected shape.
    #[error("saved state: section {section} does not decode: {source}")]
    Decode {
        /// Which.
        section: String,
        /// Why.
        source: prost::DecodeError,
    },
    /// There twice.
    #[error("saved state: section {0} is there twice")]
    Duplicate(String),
    /// Not there.
    #[error("saved state: section {0} is missing")]
    Missing(String),
    /// Newer than this build can read.
    #[error("saved state: section {section} has version {found}, this release reads up to {known}")]
    Version {
        /// Which.
        section: String,
        /// In the state.
        found: u32,
        /// The newest we read.
        known: u32,
    },
    /// A field that says something, and that this build does not know: guest state would be lost.
    #[error(
        "saved state: section {section} has a field {field} that this release does not know; what \
         it says would be lost"
    )]
    Field {
        /// Which.
        section: String,
        /// Its number, behind those of the fields around it, and its name if that is known.
        field: String,
    },
    /// There, but nobody takes it: guest state would be lost.
    #[error("saved state: nobody here knows these sections: {0}")]
    Leftover(String),
    /// A field holds what can't be.
    #[error("saved state: section {section}: {problem}")]
    Value {
        /// Which.
        section: &'static str,
        /// What is wrong.
        problem: String,
    },
}

pub(crate) fn label(name: &str, instance: &str) -> String {
    if instance.is_empty() {
        name.to_owned()
    } else {
        format!("{name}/{instance}")
    }
}

/// A section as it is written, on its way into the state: threads that save beside each other write theirs
/// themselves.
#[derive(Debug)]
pub struct Written<S> {
    version: u32,
    body: Vec<u8>,
    kind: PhantomData<fn() -> S>,
}

impl<S: Section> Written<S> {
    /// Written as this version of it.
    pub fn of(section: &S, version: u32) -> Self {
        let body = section.encode_to_vec();
        #[cfg(feature = "later")]
        let body = crate::later::amended::<S>(body);
        let kind = PhantomData;
        Self {
            version,
            body,
            kind,
        }
    }
}

/// State being written.
#[derive(Debug, Default)]
pub struct Saved {
    body: Vec<u8>,
    names: Vec<(&'static str, String)>,
}

impl Saved {
    /// Empty state, with room for `capacity` bytes so that saving allocates nothing later.
    pub fn with_capacity(capacity: usize) -> Self {
        Self {
            body: Vec::with_capacity(capacity),
            names: Vec::with_capacity(64),
        }
    }

    /// Adds a section in its newest version.
    pub fn put<S: Section>(&mut self, instance: &str, section: &S) -> Result<(), StateError> {
        self.put_version(instance, section, S::VERSION)
    }

    /// Adds a section written as an older version of it.
    pub fn put_version<S: Section>(
        &mut self,
        instance: &str,
        section: &S,
        version: u32,
    ) -> Result<(), StateError> {
        self.add(instance, Written::of(section, version))
    }

    /// Adds a section that was written elsewhere.
    pub fn add<S: Section>(
        &mut self,
        instance: &str,
        written: Written<S>,
    ) -> Result<(), StateError> {
        if self
            .names
            .iter()
            .any(|(name, i)| *name == S::NAME && i == instance)
        {
            return Err(StateError::Duplicate(label(S::NAME, instance)));
        }
        self.names.push((S::NAME, instance.to_owned()));
        let raw = RawSection {
            name: S::NAME.to_owned(),
            instance: instance.to_owned(),
            version: written.version,
            body: written.body,
        };
        raw.encode_length_delimited(&mut self.body)
            .map_err(|_| StateError::Container("a section outgrew its buffer"))
    }

    /// The whole state as bytes.
    pub fn finish(self, format: u32, writer: &str, vm: &str, epoch: u64) -> Vec<u8> {
        let header = Header {
            format,
            writer: writer.to_owned(),
            vm: vm.to_owned(),
            epoch,
            sections: u32::try_from(self.names.len()).unwrap_or(u32::MAX),
            body_len: self.body.len() as u64,
        };
        let header = header.encode_to_vec();
        let mut bytes = Vec::with_capacity(MAGIC.len() + 4 + header.len() + self.body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(
            &u32::try_from(header.len())
                .unwrap_or(u32::MAX)
                .to_le_bytes(),
        );
        bytes.extend_from_slice(&header);
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// State being read: sections that nobody has taken yet.
#[derive(Debug)]
pub struct Unclaimed {
    header: Header,
    sections: Vec<RawSection>,
}

impl Unclaimed {
    /// Reads the header alone; gives it and the offset of the body.
    pub fn header(bytes: &[u8]) -> Result<(Header, usize), StateError> {
        if bytes.len() > MAX_STATE {
            return Err(StateError::Container("larger than any state of ours"));
        }
        let rest = bytes.strip_prefix(&MAGIC).ok_or(StateError::Container(
            "it does not begin with the magic bytes",
        ))?;
        let (len, rest) = rest
            .split_first_chunk::<4>()
            .ok_or(StateError::Container("cut off in the header"))?;
        let len = u32::from_le_bytes(*len) as usize;
        let header = rest
            .get(..len)
            .ok_or(StateError::Container("cut off in the header"))?;
        let header = Header::decode(header).map_err(|source| StateError::Decode {
            section: "header".into(),
            source,
        })?;
        Ok((header, MAGIC.len() + 4 + len))
    }

    /// Splits saved state into its sections.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let (header, offset) = Self::header(bytes)?;
        let mut body = &bytes[offset..];
        if body.len() as u64 != header.body_len {
            return Err(StateError::Container(
                "its length is not what the header says",
            ));
        }
        let mut sections: Vec<RawSection> = Vec::new();
        while !body.is_empty() {
            if sections.len() == MAX_SECTIONS {
                return Err(StateError::Container(
                    "more sections than any state of ours",
                ));
            }
            let raw = RawSection::decode_length_delimited(&mut body).map_err(|source| {
                StateError::Decode {
                    section: format!("number {}", sections.len()),
                    source,
                }
            })?;
            if sections
                .iter()
                .any(|s| s.name == raw.name && s.instance == raw.instance)
            {
                return Err(StateError::Duplicate(label(&raw.name, &raw.instance)));
            }
            sections.push(raw);
        }
        if sections.len() != header.sections as usize {
            return Err(StateError::Container(
                "its number of sections is not what the header says",
            ));
        }
        Ok(Self { header, sections })
    }

    /// The header of what is being read.
    pub fn of(&self) -> &Header {
        &self.header
    }

    /// Name, instance and version of every section that nobody has taken.
    pub fn list(&self) -> Vec<(String, String, u32)> {
        let each = self.sections.iter();
        each.map(|s| (s.name.clone(), s.instance.clone(), s.version))
            .collect()
    }

    /// All sections that nobody has taken: name, instance, body.
    pub(crate) fn contents(&self) -> impl Iterator<Item = (&str, &str, &[u8])> {
        let all = self.sections.iter();
        all.map(|s| (s.name.as_str(), s.instance.as_str(), s.body.as_slice()))
    }

    /// Takes one section out, and reads it.
    pub fn take<S: Section>(&mut self, instance: &str) -> Result<S, StateError> {
        self.claim(instance)?.read()
    }

    /// Takes one section out, for whoever reads it.
    pub fn claim<S: Section>(&mut self, instance: &str) -> Result<Unread<S>, StateError> {
        let here = self
            .sections
            .iter()
            .position(|s| s.name == S::NAME && s.instance == instance);
        let Some(here) = here else {
            return Err(StateError::Missing(label(S::NAME, instance)));
        };
        let raw = self.sections.swap_remove(here);
        let kind = PhantomData;
        Ok(Unread { raw, kind })
    }

    /// Ends the reading: whatever is left is an error.
    pub fn finish(self) -> Result<(), StateError> {
        if self.sections.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = self
            .sections
            .iter()
            .map(|s| label(&s.name, &s.instance))
            .collect();
        Err(StateError::Leftover(names.join(", ")))
    }
}

/// A section that was claimed, and not read yet.
#[derive(Debug)]
pub struct Unread<S> {
    raw: RawSection,
    kind: PhantomData<fn() -> S>,
}

impl<S: Section> Unread<S> {
    /// Reads it.
    pub fn read(&self) -> Result<S, StateError> {
        let raw = &self.raw;
        let section = || label(S::NAME, &raw.instance);
        if raw.version > S::VERSION {
            return Err(StateError::Version {
                section: section(),
                found: raw.version,
                known: S::VERSION,
            });
        }
        let remarks = fields::judge(&raw.body, S::MOST).map_err(|problem| StateError::Value {
            section: S::NAME,
            problem,
        })?;
        let read = S::decode(raw.body.as_slice()).map_err(|source| StateError::Decode {
            section: section(),
            source,
        })?;
        // Protobuf skips what it does not know. What was read is as long as what was written, or
        // something of it was not read.
        if read.encoded_len() + remarks != raw.body.len()
            && let Some(field) = fields::lost::<S>(&raw.body)
        {
            return Err(StateError::Field {
                section: section(),
                field,
            });
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sections::{Probe, Vcpu, VirtioVsock, VsockConnection};

    fn saved() -> Vec<u8> {
        let mut saved = Saved::default();
        saved
            .put(
                "0",
                &Probe {
                    scratch: 7,
                    table: 0x1000,
                },
            )
            .expect("put");
        saved.finish(2, "0.2.0", "web-1", 3)
    }

    #[test]
    fn round_trip_and_header_alone() {
        let bytes = saved();
        let (header, _) = Unclaimed::header(&bytes).expect("header");
        assert_eq!(
            (header.format, header.vm.as_str(), header.epoch),
            (2, "web-1", 3)
        );
        let mut state = Unclaimed::decode(&bytes).expect("decode");
        let probe: Probe = state.take("0").expect("take");
        assert_eq!(probe.scratch, 7);
        state.finish().expect("nothing left");
    }

    #[test]
    fn leftovers_missing_and_doubles_are_errors() {
        let state = Unclaimed::decode(&saved()).expect("decode");
        assert_eq!(state.finish(), Err(StateError::Leftover("probe/0".into())));
        let mut state = Unclaimed::decode(&saved()).expect("decode");
        assert_eq!(
            state.take::<Vcpu>("0"),
            Err(StateError::Missing("vcpu/0".into()))
        );
        let mut saved = Saved::default();
        saved.put("0", &Probe::default()).expect("put");
        assert!(matches!(
            saved.put("0", &Probe::default()),
            Err(StateError::Duplicate(_))
        ));
    }

    #[test]
    fn newer_sections_are_refused_by_name() {
        let mut saved = Saved::default();
        saved
            .put_version("0", &Probe::default(), Probe::VERSION + 1)
            .expect("put");
        let bytes = saved.finish(9, "9.0.0", "x", 0);
        let error = Unclaimed::decode(&bytes)
            .expect("decode")
            .take::<Probe>("0");
        assert!(
            matches!(error, Err(StateError::Version { found, .. }) if found == Probe::VERSION + 1)
        );
    }

    #[test]
    fn what_is_beyond_any_machine_of_ours_is_refused_by_name() {
        let taken = |saved: Saved| {
            let bytes = saved.finish(3, "9.0.0", "x", 0);
            Unclaimed::decode(&bytes)
        };
        let mut many = Saved::default();
        let vsock = VirtioVsock {
            connections: vec![VsockConnection::default(); MAX_PARTS + 1],
            ..VirtioVsock::default()
        };
        many.put("vsock0", &vsock).expect("put");
        let error = taken(many).expect("decode").take::<VirtioVsock>("vsock0");
        assert!(
            matches!(error, Err(StateError::Value { section, .. }) if section == "virtio-vsock")
        );
        let mut large = Saved::default();
        let vcpu = Vcpu {
            xsave: vec![0; Vcpu::MOST],
            ..Vcpu::default()
        };
        large.put("0", &vcpu).expect("put");
        let error = taken(large).expect("decode").take::<Vcpu>("0");
        assert!(matches!(error, Err(StateError::Value { section, .. }) if section == "vcpu"));
    }

    #[test]
    fn every_truncation_and_many_corruptions_are_errors_not_panics() {
        let bytes = saved();
        for len in 0..bytes.len() {
            assert!(Unclaimed::decode(&bytes[..len]).is_err(), "cut at {len}");
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut bent = bytes.clone();
                bent[at] ^= 1 << bit;
                // Whatever it means now, reading it must end in a value or an error.
                if let Ok(mut state) = Unclaimed::decode(&bent) {
                    let _ = state.take::<Probe>("0");
                }
            }
        }
    }
}
