//! Pictures, as SVG text. They follow the viewer's light or dark setting.

mod phases;
mod strips;
mod svg;

pub(crate) use phases::phases;
pub(crate) use strips::blackout;
