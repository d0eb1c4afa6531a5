-- Version 5: who signed a release, and the least versions that may be run.
ALTER TABLE releases ADD COLUMN signed_json TEXT;

CREATE TABLE pins (
    component         TEXT PRIMARY KEY,
    minimum           TEXT NOT NULL,
    pinned_at_unix_ns INTEGER NOT NULL
) STRICT;
