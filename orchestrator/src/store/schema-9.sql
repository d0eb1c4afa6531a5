-- Version 9: who asked for what, and what came of it; and which store this is, so that two daemons that call their
-- hosts by one name are told apart.
CREATE TABLE audit (
    number        INTEGER PRIMARY KEY AUTOINCREMENT,
    at_unix_ns    INTEGER NOT NULL,
    who           TEXT NOT NULL,
    "from"        TEXT NOT NULL,
    role          TEXT,
    method        TEXT NOT NULL,
    path          TEXT NOT NULL,
    body          TEXT,
    outcome       TEXT NOT NULL,
    status        INTEGER,
    reason        TEXT,
    ended_unix_ns INTEGER
) STRICT;

CREATE INDEX audit_by_outcome ON audit (outcome, number);

CREATE TABLE identity (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    id   TEXT NOT NULL
) STRICT;
INSERT INTO identity VALUES (1, lower(hex(randomblob(16))));
