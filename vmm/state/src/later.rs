//! A later release, for tests: what it writes is to be read by this one, or refused by name.
//!
//! It knows a format more, which has a section of its own, the journal. In older formats each of its
//! sections carries a remark, which older releases go past. And it can be made *odd*: to write, in
//! every format, what older ones must not read over.

use std::sync::OnceLock;

use prost::Message;

use crate::codec::{Saved, Section, StateError, Unclaimed};
use crate::contents::{Added, Content, Contents, Kind};
use crate::fields::{REMARKS, wrapped};

/// The format that only it knows.
pub const FORMAT: u32 = 4;
/// What its remarks say.
pub const REMARK: &[u8] = b"by a later release";
/// The section whose field an older release doesn't know.
const ODD_SECTION: &str = "serial";
/// That field.
const ODD_FIELD: Added = Added {
    number: 900,
    name: "fifo_depth",
};

/// What is odd about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Oddity {
    /// A section that older releases don't know, in every format.
    Section,
    /// A field in a section that they know, said before the freeze.
    Field,
    /// The same, which only the state shows.
    HiddenField,
}

static ODD: OnceLock<Oddity> = OnceLock::new();

/// Makes it odd.
pub fn be_odd(how: &str) -> Result<(), String> {
    let oddity = match how {
        "section" => Oddity::Section,
        "field" => Oddity::Field,
        "hidden-field" => Oddity::HiddenField,
        _ => return Err(format!("{how:?} is not section, field or hidden-field")),
    };
    ODD.set(oddity).map_err(|_| "it is odd already".into())
}

/// The section of its own.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Journal {
    /// Says something, so that it is not empty.
    #[prost(uint64, tag = "1")]
    pub entries: u64,
}

impl Section for Journal {
    const NAME: &'static str = "journal";
    const VERSION: u32 = 1;
    const MOST: usize = 4 << 10;
    const ADDED: &'static [Added] = &[];
}

/// Its kind.
pub const JOURNAL: Kind = Kind {
    name: Journal::NAME,
    version: Journal::VERSION,
    added: Journal::ADDED,
};

fn has_journal(format: u32) -> bool {
    format == FORMAT || ODD.get() == Some(&Oddity::Section)
}

/// What of this a state in that format will hold.
pub fn announce(to: &mut Contents) {
    if has_journal(to.format) {
        to.announce(&JOURNAL, "");
    }
}

pub(crate) fn announce_field(section: &mut Content) {
    if section.name == ODD_SECTION && ODD.get() == Some(&Oddity::Field) {
        section.added.push(ODD_FIELD.number);
        section.added_names.push(ODD_FIELD.name.into());
    }
}

/// Adds the journal.
pub fn save(to: &mut Saved, format: u32) -> Result<(), StateError> {
    match has_journal(format) {
        true => to.put("", &Journal { entries: 7 }),
        false => Ok(()),
    }
}

/// Takes it.
pub fn load(from: &mut Unclaimed) -> Result<(), StateError> {
    if from.of().format != FORMAT {
        return Ok(());
    }
    match from.take::<Journal>("")?.entries {
        7 => Ok(()),
        other => Err(StateError::Value {
            section: Journal::NAME,
            problem: format!("{other} entries"),
        }),
    }
}

/// A section's bytes, as a later release writes them.
pub(crate) fn amended<S: Section>(mut body: Vec<u8>) -> Vec<u8> {
    let odd = matches!(ODD.get(), Some(Oddity::Field | Oddity::HiddenField));
    if odd && S::NAME == ODD_SECTION {
        body.extend(wrapped(ODD_FIELD.number, b"16"));
    }
    body.extend(wrapped(REMARKS, REMARK));
    body
}
