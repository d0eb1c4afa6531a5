//! What survives a build of the VMM: saved sections and their codec. No KVM, no I/O.
//!
//! ```text
//! +----------+------------+-----------------+---------------------------------------+
//! | MAGIC 8B | header len | Header (proto)  | sections, each length-delimited proto |
//! +----------+------------+-----------------+---------------------------------------+
//!             u32 LE        readable alone    name, instance, version, body
//! ```
//!
//! Rules, so that any release can read its neighbour's state:
//! * sections only grow: fields are added as optional, their default means "as before"; a
//!   removed field's tag is reserved;
//! * a field that a reader does not know, and that says something, is an error that names it;
//!   fields from [`fields::REMARKS`] on are the exception;
//! * saved types are not runtime types; raw KVM structures are bytes beside their size;
//! * a section nobody takes, or one that is missing, is an error: it would be lost guest state;
//! * a *format* names the set of section versions that a release writes together. A successor
//!   says which formats it reads, and the predecessor writes one of them.

pub mod codec;
pub mod contents;
pub mod fields;
pub mod golden;
#[cfg(feature = "later")]
pub mod later;
pub mod likeness;
pub mod sections;

pub use codec::{Header, Saved, Section, StateError, Unclaimed, Unread, Written};
