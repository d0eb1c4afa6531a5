-- Version 1. Times are nanoseconds since the Unix epoch; *_json columns hold types of
-- stillpoint-control.
CREATE TABLE releases (
    component        TEXT NOT NULL,
    version          TEXT NOT NULL,
    sha256           TEXT NOT NULL,
    manifest_json    TEXT NOT NULL,
    added_at_unix_ns INTEGER NOT NULL,
    PRIMARY KEY (component, version)
) STRICT;

CREATE TABLE vms (
    name               TEXT PRIMARY KEY,
    spec_json          TEXT NOT NULL,
    release            TEXT NOT NULL,
    wanted             TEXT NOT NULL,
    state              TEXT NOT NULL,
    reason             TEXT,
    process_json       TEXT,
    secret             BLOB NOT NULL,
    swaps              INTEGER NOT NULL,
    created_at_unix_ns INTEGER NOT NULL,
    changed_at_unix_ns INTEGER NOT NULL
) STRICT;

CREATE TABLE swaps (
    id               TEXT PRIMARY KEY,
    vm               TEXT NOT NULL,
    component        TEXT NOT NULL,
    from_json        TEXT NOT NULL,
    to_json          TEXT NOT NULL,
    state            TEXT NOT NULL,
    step             TEXT NOT NULL,
    reason           TEXT,
    budget_ns        INTEGER,
    successor_json   TEXT,
    epoch_before     INTEGER,
    asked_at_unix_ns INTEGER NOT NULL,
    ended_at_unix_ns INTEGER,
    report_json      TEXT
) STRICT;

CREATE INDEX swaps_of_vm ON swaps (vm, asked_at_unix_ns);
-- One unfinished swap per VM, whatever the code above believes.
CREATE UNIQUE INDEX one_open_swap_per_vm ON swaps (vm)
    WHERE state IN ('wanted', 'in_progress', 'in_doubt');
