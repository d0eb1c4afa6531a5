# The front door. `make` alone prints help; every target is a line or two.
.DEFAULT_GOAL := help
CARGO ?= cargo
RELEASES := target/releases
VMM := $(CARGO) build --release --quiet -p stillpoint-vmm

.PHONY: help
help: ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.PHONY: images
images: ## build the bare-metal test guest
	$(CARGO) build --release --quiet --manifest-path guest-images/pulse/Cargo.toml --target-dir target/pulse
	@mkdir -p $(RELEASES) && cp -f target/pulse/release/pulse $(RELEASES)/pulse

.PHONY: releases
releases: images ## build the VMM releases that tests and demo swap between
	@mkdir -p $(RELEASES)/compat $(RELEASES)/faulty $(RELEASES)/current
	$(VMM) --features compat-0-1 && cp -f target/release/stillpoint-vmm $(RELEASES)/compat/
	$(VMM) --features fault-injection && cp -f target/release/stillpoint-vmm $(RELEASES)/faulty/
	$(VMM) && cp -f target/release/stillpoint-vmm $(RELEASES)/current/

.PHONY: programs
programs: ## build the daemon and the command
	$(CARGO) build --release --quiet -p stillpoint

.PHONY: demo
demo: releases programs ## swap a running guest's VMM ten times, then offer it two that fail
	$(CARGO) run --release --quiet -p stillpoint-tests --bin demo
