-- Version 7: swaps of the host itself, in which guests stand still in their places.
ALTER TABLE swaps ADD COLUMN part_of TEXT;

CREATE TABLE host_swaps (
    id        TEXT PRIMARY KEY,
    open      INTEGER NOT NULL,
    swap_json TEXT NOT NULL
) STRICT;

-- One at a time, whatever the code above believes.
CREATE UNIQUE INDEX one_open_host_swap ON host_swaps (open) WHERE open = 1;
