# Real vLLM, real vllm-router, real kubelet: included by the Makefile.

.PHONY: e2e e2e-up e2e-down e2e-fidelity e2e-rival
e2e: setup ## Scenarios on real one-node clusters with real vLLM on CPU (root; S=3 runs one scenario; E2E_ARGS=--cluster=kubeconfig …)
	@cd e2e && ../$(BIN)/python -m pytest -q -s $(if $(S),scenarios/test_$(S)_*.py,$(if $(findstring --cluster,$(E2E_ARGS)),,-n 2 --dist loadfile --no-loadscope-reorder)) $(E2E_ARGS)

e2e-up: setup ## Bring that cluster up and leave it up
	@cd e2e && ../$(BIN)/python -m onenode up

e2e-down: setup ## Remove that cluster and those of scenarios side by side; programs and images stay in the cache
	@cd e2e && ../$(BIN)/python -m onenode down

e2e-fidelity: setup ## The simulator against a real engine under a real trace (root; half an hour; SECONDS=45 a run)
	@cd e2e && ../$(BIN)/python -m pytest -q -s fidelity

e2e-rival: setup ## The operator beside KEDA with the HPA, the same load on the same real engines (root; REPEATS=2, AFTER=330; KEDA is built once)
	@cd e2e && ../$(BIN)/python -m pytest -q -s rival $(E2E_ARGS)
