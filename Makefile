# Shortcuts, each a call of run.sh, which reads its settings (PYTHON, OUT, PRESET, SFT_ARGS ...) from the environment:
#     make smoke        PRESET=tiny make train-pretrain        OUT=out/smoke make report
TRAIN := $(addprefix train-,pretrain sft reward dpo ppo grpo)
.PHONY: all smoke setup check data tokenizer eval chat test lint report $(TRAIN)

all:
	bash run.sh
smoke:
	bash run.sh --smoke-test
setup check data tokenizer eval chat test:
	bash run.sh $@
$(TRAIN):
	bash run.sh $(@:train-%=%)
# these two need what `make setup` and `make test` have installed
report:
	"$${VENV_DIR:-.venv}/bin/python" eval.py --report "$${OUT:-out}"
lint:
	"$${VENV_DIR:-.venv}/bin/python" -m ruff check .
