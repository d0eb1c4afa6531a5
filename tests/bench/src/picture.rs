//! Pictures, as SVG text. They follow the viewer's light or dark setting.

mod crossing;
mod phases;
mod strips;
mod svg;

pub(crate) use crossing::crossing;
pub(crate) use phases::phases;
pub(crate) use strips::blackout;
