# Two images from one build: docker build --target controller . and docker build --target agent .
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY api api
COPY agent agent
COPY controllers controllers
COPY cmd cmd
ARG VERSION=unknown
ENV CGO_ENABLED=0 GOFLAGS=-buildvcs=false
RUN go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/ ./cmd/controller ./cmd/agent

FROM gcr.io/distroless/static-debian12:nonroot AS controller
COPY --from=build /out/controller /serviceproxy-controller
ENTRYPOINT ["/serviceproxy-controller"]

# The agent speaks netlink itself: no nft, no shell.
FROM gcr.io/distroless/static-debian12 AS agent
COPY --from=build /out/agent /serviceproxy-agent
ENTRYPOINT ["/serviceproxy-agent"]
