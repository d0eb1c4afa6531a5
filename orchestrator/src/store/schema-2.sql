-- Version 2: a swap may have a clock policy of its own.
ALTER TABLE swaps ADD COLUMN clock TEXT;
