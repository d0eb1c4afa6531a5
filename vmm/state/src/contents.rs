//! What a saved state is going to hold, said before anything stands still.
//!
//! A predecessor offers, for each format that it could write, the sections that there will be. A
//! successor that can't read one of them says so by name while the guest runs. What only the state
//! itself can show (a field that is at its default in most machines) is judged when it is read.

use prost::Message;

use crate::codec::{StateError, label};
use crate::sections;

/// A field that came to a section after its first release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
}

/// What a state in one format holds.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Contents {
    /// The format.
    #[prost(uint32, tag = "1")]
    pub format: u32,
    /// Its sections; those of vCPUs once for all.
    #[prost(message, repeated, tag = "2")]
    pub sections: Vec<Content>,
}

/// One section of it.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Content {
    /// Name of the kind.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Which of its kind; empty if there is one only, or for all vCPUs.
    #[prost(string, tag = "2")]
    pub instance: String,
    /// The least version it will have.
    #[prost(uint32, tag = "3")]
    pub version: u32,
    /// Numbers of fields it surely has, other than those of the version's first release.
    #[prost(uint32, repeated, tag = "4")]
    pub added: Vec<u32>,
    /// Their names.
    #[prost(string, repeated, tag = "5")]
    pub added_names: Vec<String>,
}

/// A kind of section, as this build reads it.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Name.
    pub name: &'static str,
    /// The newest version that is read.
    pub version: u32,
    /// Fields that came later.
    pub added: &'static [Added],
}

impl Contents {
    /// Nothing yet, in that format.
    pub fn new(format: u32) -> Self {
        Self {
            format,
            sections: Vec::new(),
        }
    }

    /// A section more, in its newest version.
    pub fn announce(&mut self, kind: &Kind, instance: &str) {
        self.announce_version(kind, instance, kind.version);
    }

    /// A section more, in this version.
    pub fn announce_version(&mut self, kind: &Kind, instance: &str, version: u32) {
        let section = Content {
            name: kind.name.to_owned(),
            instance: instance.to_owned(),
            version,
            added: kind.added.iter().map(|field| field.number).collect(),
            added_names: kind.added.iter().map(|f| f.name.to_owned()).collect(),
        };
        #[cfg(feature = "later")]
        let section = {
            let mut section = section;
            crate::later::announce_field(&mut section);
            section
        };
        self.sections.push(section);
    }

    /// Whether this build can read it all; the error names section and field.
    pub fn check(&self) -> Result<(), StateError> {
        #[cfg(feature = "later")]
        let known = [&sections::KINDS[..], &[crate::later::JOURNAL]].concat();
        #[cfg(not(feature = "later"))]
        let known = sections::KINDS;
        self.check_by(&known)
    }

    fn check_by(&self, known: &[Kind]) -> Result<(), StateError> {
        let kind = |section: &Content| known.iter().find(|kind| kind.name == section.name);
        let strange: Vec<_> = self
            .sections
            .iter()
            .filter(|section| kind(section).is_none())
            .map(Content::label)
            .collect();
        if !strange.is_empty() {
            return Err(StateError::Leftover(strange.join(", ")));
        }
        for section in &self.sections {
            let Some(kind) = kind(section) else { continue };
            section.check(kind)?;
        }
        Ok(())
    }
}

impl Content {
    fn label(&self) -> String {
        label(&self.name, &self.instance)
    }

    fn check(&self, kind: &Kind) -> Result<(), StateError> {
        if self.version > kind.version {
            return Err(StateError::Version {
                section: self.label(),
                found: self.version,
                known: kind.version,
            });
        }
        let unknown = |number: &u32| !kind.added.iter().any(|field| field.number == *number);
        match self.added.iter().position(unknown) {
            None => Ok(()),
            Some(at) => {
                let number = self.added[at];
                let name = self.added_names.get(at);
                Err(StateError::Field {
                    section: self.label(),
                    field: name.map_or(number.to_string(), |name| format!("{number} ({name})")),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents() -> Contents {
        let mut contents = Contents::new(3);
        for kind in &sections::KINDS {
            contents.announce(kind, "x");
        }
        contents
    }

    #[test]
    fn what_a_build_writes_it_reads() {
        contents().check().expect("its own");
        assert_eq!(contents().sections.len(), sections::KINDS.len());
    }

    #[test]
    fn sections_versions_and_fields_are_refused_by_name() {
        let mut strange = contents();
        strange.sections[0].name = "virtio-balloon".into();
        assert_eq!(
            strange.check(),
            Err(StateError::Leftover("virtio-balloon/x".into()))
        );
        let mut newer = contents();
        newer.sections[0].version += 1;
        let error = newer.check().expect_err("newer").to_string();
        assert!(error.contains("vcpu/x has version 3"), "{error}");
        let mut more = contents();
        more.sections[0].added.push(17);
        more.sections[0].added_names.push("flags".into());
        let error = more.check().expect_err("a field more").to_string();
        assert!(error.contains("vcpu/x has a field 17 (flags)"), "{error}");
        more.sections[0].added_names.clear();
        let error = more.check().expect_err("a field more").to_string();
        assert!(error.contains("vcpu/x has a field 17 that"), "{error}");
    }

    #[test]
    fn an_added_field_that_is_known_is_no_obstacle() {
        const FIELDS: &[Added] = &[Added {
            number: 17,
            name: "flags",
        }];
        let kind = Kind {
            name: "vcpu",
            version: 2,
            added: FIELDS,
        };
        let mut contents = Contents::new(3);
        contents.announce(&kind, "");
        contents.check_by(&[kind]).expect("known");
        assert!(contents.check().is_err());
    }
}
