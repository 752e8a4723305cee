# Everything a contributor runs. `make` alone lists it.
SHELL := /usr/bin/env bash -o pipefail
.SHELLFLAGS := -ec
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
IMAGE   ?= ghcr.io/serviceproxy/serviceproxy-operator
BIN      ?= bin
FUZZTIME ?= 30s
BENCH    ?= .
BENCHTIME ?= 1s
# The folder with kube-apiserver, etcd, kube-controller-manager, kube-proxy and kubectl. Unset: built from source once, and cached.
KUBERNETES = KUBEBUILDER_ASSETS=$$(hack/tools/kubernetes/build.sh)
LINT = bin/golangci-lint
# One set of flags for everything, so that programs, tests and the Kubernetes tools share what the compiler has done already.
export CGO_ENABLED ?= 0
export GOFLAGS := $(filter-out -trimpath,$(GOFLAGS)) -trimpath

.PHONY: help
help: ## Show this list.
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ Try it
.PHONY: demo demo-down
demo: setup tools ## A cluster on this machine, and the story of a Service in it. KEEP=1 leaves it up. Needs root.
	$(KUBERNETES) go run ./test/demo $(if $(KEEP),--keep)

demo-down: ## End the cluster that `make demo KEEP=1` left.
	go run ./test/demo --down

##@ Build
.PHONY: setup tools build generate manifests docker-build clean
setup: ## Install the Debian packages that tests and the demo need, if any is missing.
	hack/setup.sh

tools: ## Build the Kubernetes programs for tests and the demo, once.
	@hack/tools/kubernetes/build.sh >/dev/null

build: ## Build serviceproxy-controller and serviceproxy-agent into the folder BIN, which is bin.
	go build -ldflags "-s -w -X main.version=$(VERSION)" -o $(BIN)/serviceproxy-controller ./cmd/controller
	go build -ldflags "-s -w -X main.version=$(VERSION)" -o $(BIN)/serviceproxy-agent ./cmd/agent

generate: ## Generate Go code from the API types, and the page about configuration files.
	go tool controller-gen object:headerFile=hack/boilerplate.go.txt paths=./api/...
	go run ./hack/configdocs > docs/configuration.md

manifests: ## Generate the CRDs and the controller's role.
	go tool controller-gen crd paths=./api/... output:crd:dir=config/crd/bases
	go tool controller-gen rbac:roleName=serviceproxy-controller "paths={./controllers/...,./cmd/controller/...}" output:rbac:dir=config/rbac

docker-build: ## Build the images IMAGE-controller and IMAGE-agent at VERSION.
	docker build --build-arg VERSION=$(VERSION) --target controller -t $(IMAGE)-controller:$(VERSION) .
	docker build --build-arg VERSION=$(VERSION) --target agent -t $(IMAGE)-agent:$(VERSION) .

clean: ## Remove what was built here. The Kubernetes programs stay in the user's cache folder.
	rm -rf bin dist

##@ Check
.PHONY: fmt vet lint verify
fmt: ## Format the Go code.
	gofmt -l -w $$(git ls-files '*.go')

vet: ## Run go vet.
	go vet ./...
	go -C test/oracle vet ./...

$(LINT): hack/tools/lint/go.mod hack/tools/lint/go.sum
	@echo "building golangci-lint (once; some minutes on a cold build cache) ..."
	go -C hack/tools/lint build -o $(CURDIR)/$(LINT) github.com/golangci/golangci-lint/v2/cmd/golangci-lint

lint: $(LINT) ## Run golangci-lint, which also holds the import rules of the layout.
	$(LINT) config verify
	$(LINT) run --allow-parallel-runners
	cd test/oracle && $(CURDIR)/$(LINT) run --allow-parallel-runners

verify: ## Fail if generated files, formatting or go.mod are not up to date.
	hack/verify.sh

##@ Test
.PHONY: test test-unit test-envtest test-netns test-race e2e parity fuzz bench
test: setup tools test-unit test-envtest test-netns e2e ## All tests: unit, envtest, netns, e2e.

test-unit: ## Tests that need nothing but Go.
	hack/test.sh unit

test-envtest: ## Tests against a real API server.
	hack/test.sh envtest

test-netns: ## Tests against a real kernel in network namespaces. Need root.
	hack/test.sh netns

e2e: ## Tests of everything together, in a cluster on this machine. Need root.
	hack/test.sh e2e

test-race: export CGO_ENABLED = 1
test-race: ## Unit and envtest tests under the race detector. Needs a C compiler.
	hack/test.sh unit -race
	hack/test.sh envtest -race

parity: setup tools ## Judge our modes and kube-proxy by the same table, and write docs/parity.md. Needs root.
	$(KUBERNETES) go test -count=1 -timeout=20m ./test/parity -update

fuzz: ## Run every fuzz target for FUZZTIME.
	FUZZTIME=$(FUZZTIME) hack/fuzz.sh

bench: ## Run the benchmarks that match BENCH, BENCHTIME each. Some need root.
	go test -run='^$$' -bench='$(BENCH)' -benchtime=$(BENCHTIME) -benchmem -p=1 -timeout=60m ./agent/... ./controllers/...
