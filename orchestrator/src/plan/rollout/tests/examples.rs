//! Rules, each shown by a small fleet.
