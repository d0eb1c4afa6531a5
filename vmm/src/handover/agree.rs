//! In which format a guest's state is to be handed over: the first that is offered and read here, with
//! all that the state will hold in it.

use stillpoint_state::StateError;
use stillpoint_state::contents::Contents;

use super::Offer;
use crate::release;

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum NoFormat {
    /// None is read here.
    #[error(
        "the running release writes saved state in formats {offered:?}, this one reads {:?}",
        release::FORMATS
    )]
    Formats {
        /// What it writes.
        offered: Vec<u32>,
    },
    /// The state would hold something that we can't read.
    #[error(
        "the guest's state could not be read here, so it was not paused; format {format}: {error}"
    )]
    Contents {
        /// In which format.
        format: u32,
        /// What.
        error: StateError,
    },
}

/// The format.
pub(super) fn on_format(offer: &Offer) -> Result<u32, NoFormat> {
    let mut unreadable = None;
    for format in release::readable(&offer.formats) {
        let contents = offer.contents.iter().find(|c| c.format == format);
        match contents.map_or(Ok(()), Contents::check) {
            Ok(()) => return Ok(format),
            // What stands in the way of the newest one says most.
            Err(error) => drop(unreadable.get_or_insert(NoFormat::Contents { format, error })),
        }
    }
    Err(unreadable.unwrap_or_else(|| NoFormat::Formats {
        offered: offer.formats.clone(),
    }))
}
