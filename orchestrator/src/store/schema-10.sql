-- Version 10: which rollout ordered a swap.
ALTER TABLE swaps ADD COLUMN rollout TEXT;
