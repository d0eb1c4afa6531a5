-- Version 8: what the daemons of a fleet share, on a host that is alone; and the highest epoch of a
-- driver whose word this host has acted on.
CREATE TABLE shared (
    key     TEXT PRIMARY KEY,
    value   BLOB NOT NULL,
    version INTEGER NOT NULL,
    created INTEGER NOT NULL
) STRICT;

CREATE TABLE shared_era (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    era  INTEGER NOT NULL
) STRICT;
INSERT INTO shared_era VALUES (1, 0);

-- Of each shared store that this host belonged to: their epochs have nothing to do with each other.
CREATE TABLE driver_epochs (
    origin TEXT PRIMARY KEY,
    epoch  INTEGER NOT NULL
) STRICT;
