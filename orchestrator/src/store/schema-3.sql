-- Version 3: what guests hear of their pauses.
ALTER TABLE vms ADD COLUMN profile_json TEXT NOT NULL DEFAULT '{}';
ALTER TABLE swaps ADD COLUMN notice_ns INTEGER;
ALTER TABLE swaps ADD COLUMN no_notice TEXT;

CREATE TABLE pauses (
    id         TEXT PRIMARY KEY,
    pause_json TEXT NOT NULL
) STRICT;

CREATE TABLE event_groups (
    name     TEXT PRIMARY KEY,
    revision INTEGER NOT NULL
) STRICT;

CREATE TABLE event_listeners (
    vm            TEXT PRIMARY KEY,
    listener_json TEXT NOT NULL
) STRICT;
