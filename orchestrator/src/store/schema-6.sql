-- Version 6: what guards a swap before its freeze and after it, and what came of that.
ALTER TABLE swaps ADD COLUMN safeguards_json TEXT;
