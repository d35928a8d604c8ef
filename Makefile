# Each target does its own set-up. `make help` names what users need, `make help-all` the rest.
PYTHON ?= python3
# MLX backend: cpu (Linux CPU; on macOS this is Metal), cuda12 or cuda13.
BACKEND ?= cpu
# quick: the headline alone; short: every benchmark at HEAD, at short contexts; full: all, a long wait.
GRID ?=
# Name in results/; empty is the name asv has for this host.
MACHINE ?=

# What is installed has to be in the lock, by hash. `make LOCK= ...` takes whatever pyproject.toml allows
# instead, by no hash: for a platform that the lock has no wheels for.
LOCK ?= requirements.lock
export ASV_UNLOCKED := $(if $(LOCK),,1)

VENV := .venv$(if $(filter-out cpu,$(BACKEND)),-$(BACKEND))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BROWSER := $(VENV)/.browser
# pip shows its progress on a terminal, and elsewhere what went wrong.
QUIET := $(shell test -t 2 || echo --quiet)
INSTALL = $(BIN)/python -m pip install $(QUIET) \
	$(if $(LOCK),--require-hashes --only-binary :all: --constraint $(LOCK))
# One package of the lock, for the pip that Python brings: it knows no hashes of constraints.
PINNED = sed -n '/^$(1)==/,/\# via/p' requirements.lock > $(2)/pinned.txt && \
	$(2)/bin/python -m pip install $(QUIET) --require-hashes --only-binary :all: -r $(2)/pinned.txt

# Called from a git hook, make works in this repository and not in the hook's.
unexport $(shell git rev-parse --local-env-vars 2>/dev/null)

.DEFAULT_GOAL := help
OPTIONS := --backend $(BACKEND) $(if $(MACHINE),--machine $(MACHINE))
# A Mac asleep measures nothing.
AWAKE := $(if $(filter Darwin,$(shell uname -s)),caffeinate -i)

.PHONY: help help-all bench prove publish docs serve table adr compare noise quality doctor tune record screenshot
.PHONY: report nightly test lint workflows types unit soak
.PHONY: example requests trace format lock clean

help:
	@echo "make example     chat with a small real model (a download of 93 MB), see what was reused"
	@echo "make bench       measure the package's history and HEAD, about 10 minutes; GRID=full: hours"
	@echo "make table       what users get on this machine, by cell"
	@echo "make publish     build the page and the documentation from what was measured"
	@echo "make serve       look at the published page; PORT=8080"
	@echo "make compare     is HEAD slower than BASE=main"
	@echo "make report      all that a Mac can tell in 30 minutes, as a folder for a pull request"
	@echo "make test        lint, types and tests"
	@echo "make help-all    the other targets and the options: MACHINE=name BACKEND=cuda13 ..."

help-all: help
	@echo
	@echo "Options of all that measure: BACKEND=cuda13 (or cuda12), MACHINE=name, GRID=short or full."
	@echo "make table       FORMAT=csv or markdown, COMMIT=hash, COLUMNS=adr"
	@echo "make compare     BASE=main BENCH='overhead.Auto.*1024' OUTPUT=table.md ROUNDS=2"
	@echo "make requests    serve twelve requests with the small model in a tight budget of blocks"
	@echo "make trace       replay a request trace, plot block usage"
	@echo "make doctor      is this machine fit to measure; WAIT=seconds for idle and cool"
	@echo "make noise       measure HEAD again, for what this machine calls changed; TIMES=5 PAUSE=3600"
	@echo "make record      let git track this machine's results (MACHINE=name)"
	@echo "make nightly     what the benchmark machine does for main"
	@echo "make adr         write recorded results and figures into README and docs"
	@echo "make docs        the documentation as a site, .asv/html/docs/index.html"
	@echo "make screenshot  take the README's picture of the page"
	@echo "make tune        the fused kernels' constants and dispatch for this machine's GPU"
	@echo "make quality     what K and V in 8 and 4 bits cost the small model in quality; a GPU's work"
	@echo "make prove       a small make bench into a scratch directory, checked in a browser"
	@echo "make soak        100,000 requests through the scheduler; a server under 32 clients, 30 min"
	@echo "make lint, workflows, types, unit    the parts of make test"
	@echo "make format      let ruff rewrite the sources"
	@echo "make lock        renew requirements.lock: the newest of what pyproject.toml allows"
	@echo "make clean       remove environments, caches, models and built pages; results stay"

# Exit 2 of the first step: some benchmarks failed; what there is gets published all the same.
bench: $(READY) website/node_modules
	$(AWAKE) $(BIN)/python -m tracking.history run --grid $(or $(GRID),quick) $(OPTIONS); status=$$?; \
	test $$status = 0 -o $$status = 2 || exit $$status; \
	$(BIN)/python -m tracking.documents table --here $(OPTIONS) && \
	$(MAKE) --no-print-directory publish && exit $$status

# What CI does after the tests: the page used in a browser; asv on two commits, published and looked at.
prove: $(READY) $(BROWSER) website/node_modules
	$(BIN)/pytest tests/test_page.py
	$(BIN)/python .ci/prove.py

publish: $(READY) website/node_modules
	$(BIN)/python -m tracking.history prepare $(OPTIONS)
	$(BIN)/asv publish
	@$(MAKE) --no-print-directory docs
	@echo "page: file://$(CURDIR)/.asv/html/overhead.html (asv's own pages need a server: make serve)"

DOCS := .asv/html/docs
docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d .asv/doctrees . $(DOCS)
	@cp $(DOCS)/README.html $(DOCS)/index.html

PORT ?= 8080
serve: $(READY)
	@test -f .asv/html/overhead.html || { echo "nothing is published yet: make publish"; exit 1; }
	@echo "page: http://127.0.0.1:$(PORT)/overhead.html (asv's own: http://127.0.0.1:$(PORT)/)"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory .asv/html $(PORT) || \
	{ echo "is port $(PORT) taken? make serve PORT=8081"; exit 1; }

FORMAT ?= text
COMMIT ?=
table: $(READY)
	@$(BIN)/python -m tracking.documents table --format $(FORMAT) $(OPTIONS) \
	$(if $(COMMIT),--commit $(COMMIT))

adr: $(READY)
	$(BIN)/python -m tracking.documents documents
	$(BIN)/python -m website.overhead
	@$(MAKE) --no-print-directory table

tune: $(READY)
	$(AWAKE) $(BIN)/python -m tools.tune

BASE ?= main
BENCH ?=
OUTPUT ?=
ROUNDS ?=
# Exit 0: nothing worsened, 1: something did, 2: something failed to run (make itself says 2 for both).
compare: $(READY)
	$(AWAKE) $(BIN)/python -m tracking.compare --base $(BASE) --grid $(or $(GRID),short) $(OPTIONS) \
	$(if $(BENCH),--bench '$(BENCH)') $(if $(OUTPUT),--output $(OUTPUT)) $(if $(ROUNDS),--rounds $(ROUNDS))

TIMES ?=
PAUSE ?=
BENCHMARKS ?=
# Each run adds to what is recorded: one at a time, on different days, tells most.
noise: $(READY)
	$(AWAKE) $(BIN)/python -m tracking.noise $(OPTIONS) $(if $(TIMES),--times $(TIMES)) \
	$(if $(PAUSE),--pause $(PAUSE)) $(if $(BENCHMARKS),--benchmarks $(BENCHMARKS))

# The model computes a million tokens: minutes on a GPU, days on a CPU.
quality: $(READY)
	@$(BIN)/python examples/smollm.py
	$(AWAKE) $(BIN)/python -m tools.quality $(OPTIONS)

WAIT ?= 0
doctor: $(READY)
	@$(BIN)/python -m tracking.doctor --wait $(WAIT) $(OPTIONS)

# What a Mac can tell in half an hour: the maintainers have none.
report: $(READY)
	$(AWAKE) $(BIN)/python -m tools.report $(if $(MACHINE),--machine $(MACHINE))

# What the benchmark machine does for main.
nightly: $(READY)
	$(AWAKE) $(BIN)/python -m tracking.nightly --grid $(or $(GRID),short) $(OPTIONS)

record:
	@test -n "$(MACHINE)" -a -d "results/$(MACHINE)" || { cd results; \
	echo "say whose results: make record MACHINE=name, a folder in results/:" */; exit 1; }
	git add --force "results/$(MACHINE)"

screenshot: $(BROWSER) publish
	$(BIN)/python .ci/browser.py .asv/html docs/images/overhead.png

# Without npm overhead.html is whole, and asv's own pages load their scripts from the network.
website/node_modules: website/package-lock.json
	@cd website && npm ci --ignore-scripts --no-audit --no-fund && touch node_modules || \
	echo "npm did not work: overhead.html is whole, but asv's own pages need the network"

INSTALL_FAILED := requirements.lock has no wheel of something for this platform, or the index has another \
	file in its place (see above). make LOCK= ... installs what pyproject.toml allows, by no hash.

# Of a finished environment, on Linux.
SIZE := $(if $(filter cpu,$(BACKEND)),0.8 GB,3 GB and more)

$(READY): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	"expected Python 3.10 or newer, got " + sys.version.split()[0] + ": make PYTHON=...")'
	@echo "installing $(SIZE) into $(VENV), once"
	$(PYTHON) -m venv --clear $(VENV)
	$(if $(LOCK),$(call PINNED,pip,$(VENV)),$(INSTALL) --upgrade "pip>=26.1")
	$(INSTALL) "mlx[$(BACKEND)]" numpy --group dev || { echo "$(INSTALL_FAILED)"; exit 1; }
	$(BIN)/python -m pip install -q --no-index --no-build-isolation --no-deps --editable .
	$(BIN)/python -m pip check
	touch $@

$(BROWSER): $(READY)
	$(INSTALL) --group browser
	touch $@

test: lint workflows types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

workflows: $(READY)
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --pedantic --quiet .github/workflows

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest --numprocesses 2 --dist worksteal

soak: $(READY)
	PAGEDKV_SOAK=100000 $(BIN)/pytest tests/test_scheduler_machine.py -k soak
	PAGEDKV_SOAK_MINUTES=30 $(BIN)/pytest -s tests/test_mlx_lm_soak.py

example: $(READY)
	@$(BIN)/python examples/smollm.py
	@$(BIN)/python examples/chat.py

requests: $(READY)
	@$(BIN)/python examples/smollm.py
	@$(BIN)/python examples/serve_batch.py

trace: $(READY)
	@mkdir -p .asv
	$(BIN)/python examples/replay_trace.py --plot .asv/usage.png

lock:
	$(PYTHON) -m venv --clear .venv-lock
	$(call PINNED,uv,.venv-lock)
	.venv-lock/bin/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
	--generate-hashes --only-binary :all: --no-emit-index-url --custom-compile-command "make lock" \
	--extra cpu --extra cuda12 --extra cuda13 --group dev --group browser --group lock \
	pyproject.toml --output-file requirements.lock

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv* .asv .hypothesis .models .mypy_cache .pytest_cache .ruff_cache website/node_modules asv.*.conf.json
