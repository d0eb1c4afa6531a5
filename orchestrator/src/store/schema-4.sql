-- Version 4: what was asked and what came of it, line by line.
CREATE TABLE journal (
    number     INTEGER PRIMARY KEY AUTOINCREMENT,
    at_unix_ns INTEGER NOT NULL,
    vm         TEXT,
    swap       TEXT,
    kind       TEXT NOT NULL,
    text       TEXT NOT NULL
) STRICT;

CREATE INDEX journal_of_vm ON journal (vm, number);
