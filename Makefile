# The front door. `make` alone prints help; every target is a line or two.
.DEFAULT_GOAL := help
CARGO ?= cargo
RELEASES := target/releases
STATIC_FLAGS := --profile static --target x86_64-unknown-linux-gnu --target-dir target/static-build
STATIC := RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build --quiet --locked $(STATIC_FLAGS)
STATIC_TEST := RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) test --no-run $(STATIC_FLAGS)
# What was built, a line of JSON each; errors are still for people.
LISTED := --quiet --locked --message-format=json-render-diagnostics
BUILT := target/static-build/x86_64-unknown-linux-gnu/static
# Always together: a call with fewer packages builds what they share anew, with fewer features. Tests leave out the
# daemon's own package, whose tests alone would ask for more of them.
TEST_PACKAGES := $(addprefix -p stillpoint-,agent load images tests model fuzz)
PROGRAM_PACKAGES := -p stillpoint $(TEST_PACKAGES)
PROGRAMS := stillpoint stillpointd stillpoint-agent load images \
	suites rig rig-init scenario demo demo-events demo-fleet clock compat faults golden kernel-bench
PULSE := --quiet --locked --manifest-path guest-images/pulse/Cargo.toml --target-dir target/pulse

.PHONY: help
help: ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.PHONY: deps
deps: ## install what a fresh Debian lacks (a C compiler and make; needs root)
	@command -v cc >/dev/null && command -v make >/dev/null || (apt-get update -q && apt-get install -qy gcc make)

.PHONY: deps-browser
deps-browser: ## install Chromium, in which the daemon's pages are tested (needs root; without it those tests are skipped by name)
	@command -v chromium >/dev/null || (apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium fonts-dejavu-core)

.PHONY: pulse images
pulse: ## build pulse, the bare-metal test guest
	$(CARGO) build --release $(PULSE)
	@mkdir -p $(RELEASES) && cp -f target/pulse/release/pulse $(RELEASES)/pulse

images: programs ## the guests: pulse, and Linux from Debian's packages (IMAGES="--refresh" for newer ones)
	target/release/images --agent $(BUILT)/stillpoint-agent --load $(BUILT)/load $(IMAGES)

.PHONY: rig-luo
rig-luo: programs ## build a kernel with live update for emulated hosts, of Debian's source, in the cache (20 minutes of CPU time)
	target/release/images --luo

.PHONY: rig-static rig-shell
rig-static: programs ## lay out what the rig runs inside, and build the tests that go through many cases, optimised
	@mkdir -p target/static target/tests
	$(STATIC_TEST) $(LISTED) $(TEST_PACKAGES) --test linux --test ownership --test bounded > target/tests/optimised.json
	cp -f "$$(sed -n '/"name":"linux"/s/.*"executable":"\([^"]*\)".*/\1/p' target/tests/optimised.json)" target/static/linux
	cp -f $(addprefix $(BUILT)/,stillpoint stillpointd load rig-init scenario demo clock) $(RELEASES)/current/stillpoint-vmm target/static/

rig-shell: rig-static images ## a shell on an emulated host with KVM (RIG="--kernel backports" for the newest)
	target/release/rig shell --images bookworm --images backports $(RIG)

.PHONY: programs
programs: releases ## build the daemon, the command, and all that tests, demos and the rig run; linked statically, they run here and there
	$(STATIC) $(PROGRAM_PACKAGES) --bins
	cp -f $(addprefix $(BUILT)/,$(PROGRAMS)) target/release/

.PHONY: releases
releases: pulse ## build the VMM releases that tests and demo swap between
	@mkdir -p $(addprefix $(RELEASES)/,compat faulty later current) target/release
	$(STATIC) -p stillpoint-vmm --features compat-0-1 && cp -f $(BUILT)/stillpoint-vmm $(RELEASES)/compat/
	$(STATIC) -p stillpoint-vmm --features fault-injection && cp -f $(BUILT)/stillpoint-vmm $(RELEASES)/faulty/
	$(STATIC) -p stillpoint-vmm --features later && cp -f $(BUILT)/stillpoint-vmm $(RELEASES)/later/
	$(STATIC) -p stillpoint-vmm && cp -f $(BUILT)/stillpoint-vmm $(RELEASES)/current/
	cp -f $(RELEASES)/current/stillpoint-vmm target/release/

.PHONY: bench-program bench bench-full bench-rig bench-deps
bench-program: programs
	$(STATIC) $(PROGRAM_PACKAGES) -p stillpoint-floor -p stillpoint-bench --bins
	cp -f $(BUILT)/stillpoint-floor $(BUILT)/stillpoint-bench target/release/

bench: bench-program ## measure the blackout beside the floor and QEMU, and what a VMM weighs (BENCH="--quick" for less)
	target/release/stillpoint-bench $(BENCH)

bench-full: bench-program ## the same of every machine there is, crossed; goes on where it was broken off (BENCH="--seconds N")
	target/release/stillpoint-bench --full $(or $(BENCH),--seconds 7200)

bench-rig: bench-program rig-static images ## what a guest loses after a swap on an emulated host whose KVM can fill its page tables beforehand
	target/release/rig run --kernel backports --memory 3072 --time-limit 900 \
		--file $(BUILT)/stillpoint-bench:/stillpoint/target/release/stillpoint-bench -- stillpoint-bench --only brownout --touched-mib 512

bench-deps: bench-program ## fetch the QEMU that is measured beside us
	target/release/stillpoint-bench --fetch

.PHONY: bench-page
bench-page: ## put the last bench's tables and pictures into docs/blackout
	cp -f target/bench/blackout.md docs/blackout/measured.md
	cp -f target/bench/blackout.svg target/bench/phases.svg docs/blackout/
	@! test -f target/bench/full/full.md || cp -f target/bench/full/full.md target/bench/full/full.svg docs/blackout/

.PHONY: etcd
etcd: ## the shared store's suite on three members of etcd, killed in turn, parted, and slow; a rollout through storms (SEED=n; needs root, and strace)
	$(CARGO) test --quiet --locked -p stillpoint --test shared_store -- --ignored
	$(if $(SEED),STILLPOINT_SEED=$(SEED)) $(CARGO) test --quiet --locked -p stillpoint --test storms -- --ignored --nocapture

.PHONY: simulate
simulate: programs ## simulate rollouts over 100,000 hosts and 1,000,000 VMs; charts in target/simulation
	target/release/stillpoint simulate --hosts 100000 --vms 1000000 --charts target/simulation

.PHONY: faults faults-random budgets
faults: programs ## the crash matrix, cell by cell (ONLY="take / successor" for some)
	target/release/faults $(if $(ONLY),--only "$(ONLY)") $(if $(JOBS),--jobs $(JOBS))

faults-random: programs ## swaps with kills at random moments (N=1000, SEED=n, JOBS=n)
	target/release/faults --random $(or $(N),1000) $(if $(SEED),--seed $(SEED)) $(if $(JOBS),--jobs $(JOBS))

budgets: programs ## swaps that are slow by a millisecond more each time, around the limit of their budgets
	target/release/faults --budgets

.PHONY: compat
compat: programs ## swaps to and fro between releases, with all devices (PREVIOUS=REV builds that revision)
	target/release/compat $(if $(PREVIOUS),--previous $(PREVIOUS))

.PHONY: fuzz
fuzz: ## every fuzz target by libFuzzer for 10 minutes (needs cargo-fuzz and a nightly; SECONDS_EACH=n)
	$(CARGO) run --release --quiet --locked -p stillpoint-fuzz --bin fuzz -- --write-corpus target/fuzz-corpus
	for target in saved_state handover control machine_spec agent rings packets; do \
		$(CARGO) +nightly fuzz run --fuzz-dir vmm/fuzz/libfuzzer --target-dir target/fuzz $$target target/fuzz-corpus/$$target \
			-- -max_total_time=$(or $(SECONDS_EACH),600) -max_len=65536 -print_final_stats=1 || exit 1; done

.PHONY: golden
golden: programs ## write the golden states that are missing (beside a wire of its own; needs root)
	target/release/golden

.PHONY: clock
clock: images rig-static ## measure every promise about clocks, long ones included (CLOCK="--quick" for less, "--resume" to go on)
	target/release/clock $(CLOCK)

.PHONY: demo
demo: programs images-if-any ## swap a running guest's VMM ten times; a Debian guest where KVM is hardware
	target/release/demo

.PHONY: demo-events
demo-events: programs ## a guest's pause from both sides: announced, approved, withdrawn, urgent
	target/release/demo-events

.PHONY: demo-fleet
demo-fleet: programs ## three hosts, three members of etcd, twelve guests: a good release, a bad one, a driver that dies
	target/release/demo-fleet

.PHONY: demo-linux
demo-linux: images rig-static ## the same with a Debian guest at work, on an emulated host if need be
	target/release/demo --guest linux

.PHONY: demo-kernel
demo-kernel: rig-static images ## the host's kernel swapped under guests at work, on an emulated host (JUMP=bookworm for the same kernel again)
	target/release/rig run --name demo-kernel --time-limit 900 --memory 3072 --scratch 512 --carve-out 768 --images backports \
		--jump $(or $(JUMP),backports) --then "scenario kernel --debian" -- scenario kernel --debian --into $(or $(JUMP),backports)

.PHONY: demo-changes
demo-changes: rig-static images ## every change of the host in turn, under three Debian guests and two others at work, on an emulated host (10 minutes)
	target/release/rig run --name demo-changes --time-limit 2700 --memory 3584 --scratch 768 --carve-out 1024 --scenario --peer \
		--images bookworm --images backports --archive curl --jump bookworm --jump backports --then "scenario tour" \
		-- scenario tour $(addprefix --leg ,$(or $(LEGS),modules bookworm backports bookworm))

.PHONY: bench-kernel
bench-kernel: rig-static images ## what of a swap of the host's kernel is ours: pairs with an empty kexec, on an emulated host (BENCH="--pairs 2"; BENCH=--parameters: what words of its command line are worth)
	target/release/kernel-bench $(BENCH)

# Where Debian's packages can't be had, the tests that need them are skipped by name.
.PHONY: images-if-any
images-if-any:
	@$(MAKE) --no-print-directory images || echo "no images of Linux guests: the tests that need them are skipped"

# All at once: a call for a package alone builds what it shares with others anew, with other features.
.PHONY: tests test
tests:
	@mkdir -p target/tests
	$(CARGO) test --no-run $(LISTED) --workspace --features stillpoint/fault-injection > target/tests/debug.json

test: rig-static images-if-any tests ## run every test; prints each suite's time (SUITES="swap rig" for some)
	target/release/suites $(SUITES)

.PHONY: linux
linux: images rig-static ## every scenario of Debian guests on emulated hosts with either kernel (20 minutes)
	$(CARGO) test --quiet --locked -p stillpoint-tests --test rig -- --ignored --test-threads=1 every_scenario

.PHONY: luo
luo: rig-luo images rig-static ## guests in memfds that live update keeps, under ten kexecs of an emulated host (5 minutes, and the kernel's build once)
	$(CARGO) test --quiet --locked -p stillpoint-tests --test rig -- --ignored --test-threads=1 live_update

.PHONY: fmt lint
fmt: ## check the formatting
	$(CARGO) fmt --check && $(CARGO) fmt --check --manifest-path guest-images/pulse/Cargo.toml
lint: ## clippy, warnings denied
	$(CARGO) clippy --quiet --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --release $(PULSE) -- -D warnings

.PHONY: docs
docs: ## build the documentation of every crate
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --quiet --locked --workspace --no-deps

.PHONY: check
check: fmt lint docs test ## exactly what CI runs

.PHONY: openapi
openapi: ## write the API's document anew after a change of the API
	$(CARGO) run --quiet --locked -p stillpoint --bin stillpointd -- --print-openapi > orchestrator/openapi.json
	$(CARGO) run --quiet --locked -p stillpoint --bin stillpointd -- --print-guest-openapi > orchestrator/guest-openapi.json
