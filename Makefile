# Creates what it needs in .venv; nothing else on the machine is touched.

PYTHON ?= $(shell for each in python3.13 python3.12 python3.11 python3; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$each; break; }; done)
VENV := .venv
BIN := $(VENV)/bin

# Where the environment forbids it, as in many containers, each of thousands of processes would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

# A suite runs in a directory of its own, which {tmp} stands for, and may leave nothing behind; `exec`, so that it hears of
# it when make is ended. PART=2/5 runs a part of a long one, FAILED=1 what failed in it last.
# Where tests leave their figures for the scoreboard: each suite has a place, where each test replaces its own.
export FIGURES = $(CURDIR)/build/figures/$@
CONTAINED := $(BIN)/python -m tests.ci.contained
XEN_OF = $(if $(XEN),--xen $(XEN))
PART_OF = $(if $(FAILED),,$(if $(PART),--part $(PART)))
FAILED_OF = -o cache_dir=build/failed/$1 $(if $(FAILED),--last-failed --last-failed-no-failures=none,--cache-clear)

.PHONY: run test test-system test-all test-images test-fuzz test-model test-orders fuzz test-xen test-chroots chaos chaos-engines soak scoreboard figures bench-xen bench-kills bench
.PHONY: deb deb-former dist docs clean

run: $(VENV)/.run  ## show the whole thing at work on a simulated Xen
	$(BIN)/xenbackend demo

# Service, workers and guests together on the simulated Xen, real devices, hostile guests, each of our processes by
# itself, and what is built of the sources: these take their time.
MACHINES = tests/system tests/embedded tests/ring_fuzz tests/soak tests/bench/test_session.py tests/block/test_locks_with_qemu.py \
	$(addprefix tests/cli/test_,apart.py bench.py completion.py demo.py demo_keep.py disk.py doctor.py metrics_http.py report.py \
	top.py upgrade.py) $(addprefix tests/contract/test_,client.py worker.py) tests/doctor/test_pieces.py \
	$(addprefix tests/supervisor/service/test_,births.py fleet.py main.py openers.py parent.py served.py zygote.py) \
	tests/test_release.py tests/test_site.py tests/walls/test_raising.py \
	$(addprefix tests/worker/test_,birth.py drained.py in_use.py kept_writes.py main.py nbd_barrier.py stages.py zygote.py)

test: $(VENV)/.dev  ## the whole fast suite, and what keeps the code in shape
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	exec $(CONTAINED) $(BIN)/pytest -q -n 4 --dist loadgroup --basetemp={tmp}/t $(call FAILED_OF,test) \
		$(addprefix --ignore=,tests/engines tests/chroots $(MACHINES))

test-system: $(VENV)/.dev  ## whole machines: services that follow one another, taken-over workers, kills, two administrators
	exec $(CONTAINED) $(BIN)/pytest -q -n 4 --dist loadgroup --basetemp={tmp}/t $(PART_OF) $(call FAILED_OF,system) $(MACHINES)

# What CI runs in part, with what it runs whole; tests/ci/steps.py. What has passed with the same code is not run again.
test-all:  ## every suite in full, in hours; may be stopped and goes on; the report is build/all/report.txt
	$(PYTHON) -m tests.ci full $(if $(ANEW),--anew)

# S=number begins the random numbers elsewhere. In memory: what is synced that often would take a disk hours.
test-images: $(VENV)/.dev  ## image formats at length: a million requests to each, kills, power losses, damage
	exec env TMPDIR=/dev/shm nice $(CONTAINED) $(BIN)/pytest -v -n 2 --dist worksteal -o tmp_path_retention_policy=failed \
		-o faulthandler_timeout=0 --basetemp={tmp}/t --seed $(or $(S),1) --long --requests 1000000 $(PART_OF) \
		$(call FAILED_OF,images) tests/block/test_large.py tests/block/test_any_chains.py tests/block/qcow/test_kills.py \
		tests/block/mapped/test_blocks.py tests/block/drivers/test_vdi.py tests/block/test_hostile_parents.py \
		tests/block/test_damaged_tables.py

# nbdkit, qemu-nbd and qemu-storage-daemon, as far as they are installed.
test-engines: $(VENV)/.dev  ## disks on real NBD servers and a real Ceph: kills, stops, locks, names, limits
	exec $(CONTAINED) $(BIN)/pytest -q -n 2 --dist worksteal --basetemp={tmp}/t $(call FAILED_OF,engines) tests/engines

# KILLS=number, or HOURS=number; OPERATIONS=number spreads the kills over so many requests; S=number plans other steps.
chaos: $(VENV)/.dev  ## kill everything below guests under load, while administrators order; the figures are build/chaos.json
	mkdir -p build
	exec $(CONTAINED) $(BIN)/python -m tests.chaos --kills $(or $(KILLS),1000) $(if $(HOURS),--hours $(HOURS)) \
		$(if $(OPERATIONS),--operations $(OPERATIONS)) --seed $(or $(S),1) --json build/chaos.json

# The same below disks of NBD servers and of a Ceph, whose servers are killed, stopped and continued, too.
# KILLS=number of each engine, S=number; ENGINE=nbdkit, qemu-nbd or rbd runs one of them.
chaos-engines: $(VENV)/.dev  ## the same with disks on real NBD servers and a real Ceph; the figures are build/chaos-ENGINE.json
	mkdir -p build
	for engine in $(or $(ENGINE),nbdkit qemu-nbd rbd); do $(CONTAINED) $(BIN)/python -m tests.chaos --engine $$engine \
		--kills $(or $(KILLS),1000) --seed $(or $(S),1) --json build/chaos-$$engine.json || exit 1; done

# KILLS=number of each. It means something only on a host that does nothing else.
bench-kills: $(VENV)/.dev  ## how long a guest waits for its next answer after a kill, below nbdkit and Ceph; the figures are build/pauses.json
	mkdir -p build
	exec $(CONTAINED) $(BIN)/python -m tests.engines.pauses --kills $(or $(KILLS),100) --json build/pauses.json

# HOURS=number, DISKS=number. It takes 1.5 GiB of memory; the figure is of 128 disks, and of no fewer.
soak: $(VENV)/.dev  ## 128 disks under verified load for an hour, and nothing that grows; the figures are build/soak.json
	mkdir -p build
	exec nice $(CONTAINED) $(BIN)/python -m tests.soak --hours $(or $(HOURS),1) --disks $(or $(DISKS),128) --seed $(or $(S),1) \
		--json build/soak.json

test-model: $(VENV)/.dev  ## every order of guest, disk, kills and events in small, known faults, failing calls
	exec nice $(CONTAINED) $(BIN)/pytest -q -n 2 --dist worksteal -o faulthandler_timeout=0 --basetemp={tmp}/t --long $(PART_OF) \
		$(call FAILED_OF,model) tests/explore tests/worker/test_recovery.py tests/model tests/system/test_failing_calls.py \
		tests/supervisor/vbd/test_device_is_total.py

# ORDERS=number; S=number chooses others. What has failed is printed with the command that does it again.
test-orders: $(VENV)/.dev  ## the control plane in one process, with kills and several administrators: every reply is true
	exec nice $(CONTAINED) $(BIN)/python -m tests.model --orders $(or $(ORDERS),100000) --seed $(or $(S),1)

# A hundred thousand for each format, in a minute: each may take a second and 512 MiB, and end in one kind of error.
test-fuzz: $(VENV)/.dev  ## headers and tables of image formats with random damage
	rm -rf $(FIGURES)
	exec $(CONTAINED) $(BIN)/pytest -q -n 2 --dist worksteal -o faulthandler_timeout=0 \
		--basetemp={tmp}/t --seed $(or $(S),1) --requests 2000000 -k any_bytes tests/block/formats

# N=messages, JOBS=processes, one for each CPU else; it goes on where the last run of the same seed has ended, and may be
# ended anywhere; ANEW=1 begins again.
fuzz: $(VENV)/.dev  ## hostile ring messages, rewritten while they are read; the figures are build/fuzz-SEED.json
	exec nice $(CONTAINED) $(BIN)/python -m tests.ring_fuzz --messages $(or $(N),1000000) --seed $(or $(S),1) \
		--json build/fuzz-$(or $(S),1).json $(if $(JOBS),--jobs $(JOBS)) $(if $(ANEW),--anew)

# K=expression runs some of them, as pytest's -k has it; AGAIN=1 gives what failed another chance, on a fresh machine;
# TIMES=N runs each N times.
# XEN=4.17 is another version (tests/xen/bed/release.py). The first time it builds an image, which only root can.
test-xen: $(VENV)/.dev  ## the suite in the dom0 of a real Xen under emulation; skipped where that is not possible
	exec $(CONTAINED) $(BIN)/python -m tests.xen.bed $(XEN_OF) $(if $(AGAIN),--again) $(if $(FAILED),--failed) $(PART_OF) $(if $(TIMES),--times $(TIMES)) $(if $(K),-k '$(K)')

bench-xen: $(VENV)/.dev  ## measure beside blkback and qdisk there; the tables are build/xen/speed.txt and counts.txt
	exec $(CONTAINED) $(BIN)/python -m tests.xen.bed $(XEN_OF) --cpus 2 $(if $(K),-k '$(K)') tests/xen/speed.py

# N=requests of each. A disk that is full, or fails its flushes, again and again; what frontends and toolstacks may write.
figures: $(VENV)/.dev  ## what the scoreboard wants, and no other suite does at length
	exec nice $(CONTAINED) $(BIN)/pytest -q -n 2 -o faulthandler_timeout=0 --basetemp={tmp}/t --seed $(or $(S),1) \
		--requests $(or $(N),1000000) tests/worker/test_failing_disks.py \
		tests/blkif/test_features.py::test_any_values_are_a_frontend_or_refused \
		tests/supervisor/vbd/test_device_is_total.py::test_random_walks_keep_the_invariants
	exec nice $(CONTAINED) $(BIN)/python -m tests.scoreboard.branches

# Only root can; the first time they are built from the distribution's registry, and cached. K=expression runs some of them.
test-chroots: $(VENV)/.dev deb deb-former  ## the package in chroots of Debian 12 and 13: demo, upgrade, purge, lintian; `make test` with newer Pythons
	exec $(CONTAINED) $(BIN)/pytest -q -o faulthandler_timeout=0 --basetemp={tmp}/t $(call FAILED_OF,chroots) tests/chroots $(if $(K),-k '$(K)')

# What suites have left in build/, and what is measured in seconds. RELEASE=1 fails where something is not measured, too.
scoreboard: $(VENV)/.dev  ## every measure with its goal and its figure; fails where a figure is below its goal
	exec $(BIN)/python -m tests.scoreboard $(if $(RELEASE),--release)

bench: $(VENV)/.run  ## measure beside the peers that are installed
	$(BIN)/xenbackend bench --compare

docs: $(VENV)/.dev  ## the site of documentation, in build/docs/html; fails where a link leads nowhere
	$(BIN)/python docs/make_site.py build/docs

dist: $(VENV)/.dev  ## an sdist and a wheel, in dist/; docs/release.md
	$(BIN)/python -m hatchling build --directory dist

# Of a copy: what a build leaves behind does not land in the checkout. `apt-get build-dep .` brings what it needs.
# Whoever builds it maintains it: DEBFULLNAME and DEBEMAIL, as Debian's own tools take them.
deb:  ## a Debian package, in dist/
	rm -rf build/deb
	mkdir -p build/deb/source dist
	cp -a debian systemd udev xenbackend docs pyproject.toml hatch_build.py README.md LICENSE CHANGELOG.md SECURITY.md ARCHITECTURE.md \
		build/deb/source/
	[ -z "$(DEBEMAIL)" ] || sed -i 's/^Maintainer: .*/Maintainer: $(or $(DEBFULLNAME),$(DEBEMAIL)) <$(DEBEMAIL)>/' \
		build/deb/source/debian/control
	cd build/deb/source && dpkg-buildpackage --build=binary --no-sign
	mv build/deb/xenbackend_*_all.deb dist/

# The last release's, for the test of an upgrade on Xen; in dist/former.
FORMER = $(shell sed -n 's/^COMMIT = "\([^"]*\)".*/\1/p' tests/former_release.py)
deb-former:
	rm -rf build/deb-former
	mkdir -p build/deb-former/source dist/former
	git archive $(FORMER) debian systemd udev xenbackend pyproject.toml README.md LICENSE CHANGELOG.md \
		| tar --extract --directory=build/deb-former/source
	cd build/deb-former/source && dpkg-buildpackage --build=binary --no-sign
	mv build/deb-former/xenbackend_*_all.deb dist/former/

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "xenbackend needs Python 3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "install python3-venv first" >&2; exit 1; }

$(VENV)/.run: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml tests/third_party/pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps ./tests/third_party
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
