# Needs Go. On Debian and Ubuntu, targets install with apt what else they need.
#
#   make attach   build, put the filter in force, show its status
#   make install  install the command and a service: systemctl enable --now egressbpf
#   make packages make deb and rpm packages, in bin/packages
#   make test     run all tests
#   make image    make container images, in bin/image
#   make release  make everything that a release has, in bin/release
#   make demo     show the filter at work, on this machine alone
#   make bench    measure what the filter costs, beside other ways to filter
#   make performance
#                 the same, and write docs/performance.md
#   make pictures draw the pictures in docs/pictures
#   make kernels  write docs/kernels.md, from a test on each kernel
#   make manifests
#                 write dist/kubernetes/egressbpf.yaml, from the Helm chart

SHELL := /bin/bash
GO ?= go
SUDO ?= $(shell [ "$$(id -u)" = 0 ] || echo sudo)
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
INSTALL := internal/test/testenv/install.sh
PREFIX ?= /usr/local
DESTDIR ?=
# The same for all that is compiled, so that Go compiles each package once.
override CGO_ENABLED := 0
override GOFLAGS := $(strip $(filter-out -trimpath,$(or $(GOFLAGS),$(shell $(GO) env GOFLAGS))) -trimpath)
export CGO_ENABLED GOFLAGS
LDFLAGS := -s -w -X github.com/egressbpf/egressbpf/internal/loader.version=$(VERSION)

.PHONY: build
build:
	$(GO) build -ldflags '$(LDFLAGS)' -o bin/egressbpf ./cmd/egressbpf

.PHONY: attach
attach: build
	$(SUDO) bin/egressbpf attach

.PHONY: install
install: build
	$(SUDO) install -D -m 755 bin/egressbpf $(DESTDIR)$(PREFIX)/sbin/egressbpf
	sed 's|@BINDIR@|$(PREFIX)/sbin|' dist/egressbpf.service | \
		$(SUDO) install -D -m 644 /dev/stdin $(DESTDIR)$(PREFIX)/lib/systemd/system/egressbpf.service
	rm -rf bin/man8 && bin/egressbpf man bin/man8
	$(SUDO) install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/man/man8 bin/man8/*
	$(SUDO) install -D -m 644 dist/config.yaml $(DESTDIR)$(PREFIX)/share/doc/egressbpf/config.yaml
	$(SUDO) install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/egressbpf/prometheus dist/prometheus/*.yml
	$(SUDO) install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/egressbpf/grafana dist/grafana/egressbpf.json
	[ -n '$(DESTDIR)' ] || [ ! -d /run/systemd/system ] || { $(SUDO) systemctl daemon-reload && $(SUDO) systemctl try-restart egressbpf; }

# The filter stays in force: run `egressbpf detach` first to remove it.
.PHONY: uninstall
uninstall:
	-[ -n '$(DESTDIR)' ] || [ ! -d /run/systemd/system ] || $(SUDO) systemctl disable --now egressbpf
	$(SUDO) rm -f $(DESTDIR)$(PREFIX)/sbin/egressbpf $(DESTDIR)$(PREFIX)/lib/systemd/system/egressbpf.service
	$(SUDO) rm -f $(DESTDIR)$(PREFIX)/share/man/man8/egressbpf*.8
	$(SUDO) rm -rf $(DESTDIR)$(PREFIX)/share/doc/egressbpf $(DESTDIR)$(PREFIX)/share/egressbpf
	[ -n '$(DESTDIR)' ] || [ ! -d /run/systemd/system ] || $(SUDO) systemctl daemon-reload

ARCHES ?= amd64 arm64

# deb and rpm packages for amd64 and arm64, in bin/packages. The same commit makes the same
# packages.
.PHONY: packages
packages: build
	rm -rf bin/packages
	for arch in $(ARCHES); do \
		GOARCH=$$arch $(GO) build -ldflags '$(LDFLAGS)' -o bin/linux-$$arch/egressbpf ./cmd/egressbpf && \
		dist/packages/build.sh '$(VERSION)' $$arch bin/linux-$$arch/egressbpf bin/egressbpf bin/packages || exit 1; \
	done

# Also checks how versions become those of packages.
.PHONY: lint-packages
lint-packages: packages
	@$(INSTALL) lintian:lintian rpm:rpm rpmlint:rpmlint
	dist/packages/test.sh bin/packages

.PHONY: demo
demo: build
	@$(INSTALL) ip:iproute2 busybox:busybox-static
	@$(SUDO) internal/test/demo/demo.sh bin/egressbpf

.PHONY: bench
bench: build bin/bench
	$(SUDO) bin/bench run -o bin/results.json

# Less than a minute; the bounds have room for any machine.
.PHONY: bench-quick
bench-quick: bin/bench
	$(SUDO) bin/bench run --quick -o bin/results.json

.PHONY: bin/bench
bin/bench:
	@$(INSTALL) ip:iproute2 nft:nftables iptables:iptables
	$(GO) build -ldflags '$(LDFLAGS)' -o bin/bench ./internal/test/bench

# Measures for docs/performance.md, and writes the page. Needs a quiet machine.
.PHONY: performance
performance: build bin/bench
	mkdir -p docs/performance
	$(SUDO) bin/bench run -o docs/performance/results.json
	bin/bench report

# Writes docs/performance.md and its plots from docs/performance/results.json.
.PHONY: performance-report
performance-report: bin/bench
	bin/bench report

# Draws the pictures of the documentation. The dashboard has two minutes of traffic.
.PHONY: pictures
pictures: test-tools
	mkdir -p docs/pictures
	$(GO) build -o bin/pictures ./internal/test/pictures
	$(SUDO) bin/pictures docs/pictures
	$(GO) test -count=1 -exec '$(if $(SUDO),$(SUDO) env PATH=$(PATH))' ./internal/test/prometheus \
		-run TestScrape/plain -args -picture $(CURDIR)/docs/pictures/dashboard.svg -traffic 2m

# The modules of Go, all at once: the compiler gets them one by one, which takes minutes.
.PHONY: download
download:
	printf '%s\n' . tools tools/actionlint | xargs -P 3 -I{} $(GO) -C {} mod download

# The kernels for test-kernels, and a whole Debian.
.PHONY: download-kernels
download-kernels: test-tools
	internal/test/vmtest/test.sh --download

.PHONY: test
test: test-tools
	internal/test/vmtest/test.sh --beside $(MAKE) --no-print-directory test-race test-host

# The packages whose goroutines share data are tested with the race detector, which needs cgo.
RACED := container daemon docker events tell top
TEST = $(GO) test -count=1 -timeout 2h -exec '$(if $(SUDO),$(SUDO) env PATH=$(PATH)) $(CURDIR)/internal/test/testenv/exec.sh'

.PHONY: test-race
test-race:
	@$(INSTALL) gcc:gcc libc6-dev
	CGO_ENABLED=1 $(TEST) -race $(RACED:%=./internal/%)

.PHONY: test-host
test-host: build test-tools compiler
	packages=$$($(GO) list ./...) && $(TEST) $$(grep -vE '/internal/($(subst $() ,|,$(RACED)))$$' <<<"$$packages")
	cd tools && GOFLAGS=-trimpath $(GO) test ./release

.PHONY: test-kernels
test-kernels: test-tools
	internal/test/vmtest/test.sh

# Writes docs/kernels.md, from a test on each kernel.
.PHONY: kernels
kernels: test-tools
	internal/test/vmtest/test.sh --document

.PHONY: test-debian
test-debian: test-tools
	internal/test/vmtest/test.sh boot debian

# The packages and the image: install, upgrade, going back, removal, on a whole Debian. The rpm packages by
# Debian's rpm.
.PHONY: test-packages
test-packages: test-tools
	internal/test/vmtest/test.sh deb rpm image

# The Ansible role and the cloud-init user-data, by Ansible and cloud-init on a whole Debian.
.PHONY: test-fleet
test-fleet: test-tools
	internal/test/vmtest/test.sh fleet

.PHONY: lint-fleet
lint-fleet:
	@$(INSTALL) ansible-lint:ansible-lint yamllint:yamllint
	yamllint --strict -d '{extends: default, rules: {line-length: {max: 120}, document-start: disable, comments: {require-starting-space: false}}}' \
		dist/ansible dist/cloud-init
	ANSIBLE_ROLES_PATH=dist/ansible ansible-lint --offline --nocolor --profile production dist/ansible/egressbpf dist/ansible/rolling.yml

# The chart and the manifests for Kubernetes: helm lint, several renderings, compared with the schemas of
# Kubernetes, their config files read by egressbpf. Go builds Helm and kubectl-validate for it, which takes minutes,
# once. So .ci/run has only the test that the manifests are made from the chart.
.PHONY: lint-kubernetes
lint-kubernetes:
	$(GO) test -count=1 -tags helm ./internal/test/kubernetes

# Writes dist/kubernetes/egressbpf.yaml, from the chart.
.PHONY: manifests
manifests:
	$(GO) test -count=1 -tags helm ./internal/test/kubernetes -run TestManifests -args -write

.PHONY: test-tools
test-tools:
	@$(INSTALL) ip:iproute2 nft:nftables iptables:iptables tmux:tmux dockerd:docker.io containerd:containerd /usr/lib/cni/bridge:containernetworking-plugins prometheus:prometheus \
		chromium:chromium fonts-dejavu-core apparmor_parser:apparmor $$(internal/test/vmtest/run.sh --packages)
	@$(INSTALL) docker:docker-cli # not part of docker.io on newer releases

# For generated objects, and for tests that make a later version.
.PHONY: compiler
compiler:
	@$(INSTALL) clang-19:clang-19 llvm-strip-19:llvm-19 libbpf-dev

# Compiles the committed objects: see gen.go. Another compiler produces other objects.
.PHONY: generate
generate: compiler
	$(GO) generate ./...

# The tool that builds images and releases. What it writes depends on the version of Go, so it has
# the one of go.mod, not a newer one.
GO_PINNED = GOTOOLCHAIN=$(shell sed -n 's/^toolchain //p' go.mod) $(GO)
.PHONY: bin/release-tool
bin/release-tool:
	GOFLAGS=-trimpath GOAMD64= $(GO_PINNED) -C tools build -o ../bin/release-tool ./release

# Container images of the work tree: bin/image/egressbpf-image-amd64.tar and -arm64.tar for
# `docker load`, egressbpf-image.oci.tar with both for registries. Needs no Docker.
.PHONY: image
image: bin/release-tool
	bin/release-tool -version '$(VERSION)' -o bin/image image

# Everything that a release has, in bin/release, for the tag of the commit; with VERSION=v1.2.3-rc.1,
# whatever the commit is. See docs/releasing.md.
.PHONY: release
release: bin/release-tool
	bin/release-tool -version '$(if $(filter command environment,$(firstword $(origin VERSION))),$(VERSION))' -o bin/release release

# Builds a release twice, at different paths, and compares; looks at what is in it.
.PHONY: release-check
release-check:
	$(GO) test -count=1 -v ./internal/test/release
	cd tools && GOFLAGS=-trimpath $(GO) test -count=1 ./release

.PHONY: lint
lint:
	@test -z "$$(gofmt -l .)" || { echo 'gofmt:'; gofmt -l .; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags helm ./internal/test/kubernetes
	$(GO) tool staticcheck ./...
	@$(INSTALL) shellcheck:shellcheck
	shellcheck --severity=warning internal/test/*/*.sh internal/test/vmtest/debian/run internal/test/vmtest/packages/run internal/test/vmtest/fleet/* dist/packages/*.sh .ci/run
	for script in $(filter-out %/lib.sh,$(wildcard dist/packages/scripts/*)); do \
		{ printf '#!/bin/sh\nset -e\n' && cat dist/packages/scripts/lib.sh $$script; } | shellcheck --severity=warning - || exit 1; \
	done
	$(GO) tool -modfile=tools/actionlint/go.mod actionlint
	cd tools && $(GO) vet ./release && $(GO) tool -modfile=../go.mod staticcheck ./release

# Not every machine can reach the database of vulnerabilities; no other failure is excused.
.PHONY: vulnerabilities
vulnerabilities:
	@out=$$($(GO) tool govulncheck ./... 2>&1) || { \
		grep -q 'fetching vulnerabilities' <<<"$$out" && echo 'not checked: the database cannot be reached from here'; \
	} || { echo "$$out"; exit 1; }

.PHONY: clean
clean:
	rm -rf bin
