// Package echo is what runs in the pods of an embedded cluster: a server that tells who answered and whom it saw asking.
package echo

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/serviceproxy/serviceproxy-operator/test/netns"
)

// Identity is who a server is.
type Identity struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Node      string `json:"node"`
}

// Answer is what a server says to each message.
type Answer struct {
	Identity
	// Client is the peer that the server saw, after all translation on the way.
	Client netip.AddrPort `json:"client"`
	// Server is the address and port at which it was reached.
	Server netip.AddrPort `json:"server"`
	// Message is what was asked.
	Message string `json:"message"`
}

// Port is where to listen.
type Port struct {
	Network string // tcp or udp
	Number  uint16
}

// Server answers on the ports of one pod. Over TCP each line is a message, and so is an HTTP request's path (so that curl works);
// over UDP each datagram. Each is answered by one line of JSON, an Answer.
type Server struct {
	who Identity

	wg        sync.WaitGroup // of all goroutines
	mu        sync.Mutex
	listeners []io.Closer
	conns     map[net.Conn]bool
	refusing  bool
	idle      chan struct{} // closed when refusing and no connection is left
}

// Serve starts a server in a namespace, listening at each of the addresses on each of the ports: never at the wildcard address,
// from which a UDP answer could leave with another source than the one that was asked.
func Serve(ns *netns.NS, who Identity, addresses []netip.Addr, ports []Port) (*Server, error) {
	s := &Server{who: who, conns: map[net.Conn]bool{}, idle: make(chan struct{})}
	err := ns.Do(func() error {
		for _, a := range addresses {
			for _, p := range ports {
				if err := s.listen(netip.AddrPortFrom(a, p.Number), p.Network); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Server) listen(at netip.AddrPort, network string) error {
	switch network {
	case "tcp":
		l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		s.listeners = append(s.listeners, l)
		s.wg.Go(func() { s.accept(l) })
	case "udp":
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		s.listeners = append(s.listeners, c)
		s.wg.Go(func() { s.answerDatagrams(c, at) })
	default:
		return fmt.Errorf("listen at %s: network %q: must be tcp or udp", at, network)
	}
	return nil
}

// Refuse ends listening: new connections and datagrams are refused from now on, open connections go on.
// The channel is closed when the last of them has ended.
func (s *Server) Refuse() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.refusing {
		s.refusing = true
		for _, l := range s.listeners {
			l.Close()
		}
		s.closeIfIdle()
	}
	return s.idle
}

// Close ends listening and every connection (with a reset), and returns when all is gone.
func (s *Server) Close() {
	s.Refuse()
	s.mu.Lock()
	for c := range s.conns {
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetLinger(0) //nolint:errcheck // on error it is closed already
		}
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *Server) accept(l *net.TCPListener) {
	for {
		c, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, for example: it passes
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if !s.track(c) {
			c.Close()
			return
		}
		s.wg.Go(func() {
			defer s.untrack(c)
			defer c.Close()
			s.converse(c)
		})
	}
}

// converse answers line after line until the peer has nothing more to say.
func (s *Server) converse(c *net.TCPConn) {
	client, server := addrPort(c.RemoteAddr()), addrPort(c.LocalAddr())
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil && line == "" {
			return
		}
		line = strings.TrimRight(line, "\r\n")
		if strings.HasSuffix(line, " HTTP/1.1") || strings.HasSuffix(line, " HTTP/1.0") {
			if !s.answerHTTP(c, r, line, client, server) {
				return
			}
			continue
		}
		if _, err := c.Write(s.answer(client, server, line)); err != nil {
			return
		}
	}
}

// answerHTTP answers a request whose first line has been read. It tells whether the connection goes on.
func (s *Server) answerHTTP(c net.Conn, r *bufio.Reader, line string, client, server netip.AddrPort) bool {
	req, err := http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader(line+"\r\n"), &untilBlankLine{r: r})))
	if err != nil {
		return false
	}
	if req.ContentLength > 0 {
		if _, err := io.CopyN(io.Discard, r, req.ContentLength); err != nil {
			return false
		}
	}
	body := s.answer(client, server, req.URL.Path)
	keep := !req.Close && req.ContentLength >= 0
	header := "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n"
	if !keep {
		header += "Connection: close\r\n"
	}
	_, err = c.Write(append([]byte(header+"\r\n"), body...))
	return keep && err == nil
}

// untilBlankLine reads up to and including the blank line that ends a header, and not a byte further.
type untilBlankLine struct {
	r    *bufio.Reader
	rest []byte
	done bool
}

func (u *untilBlankLine) Read(p []byte) (int, error) {
	if len(u.rest) == 0 {
		if u.done {
			return 0, io.EOF
		}
		line, err := u.r.ReadBytes('\n')
		if err != nil {
			return 0, err
		}
		u.rest, u.done = line, len(strings.TrimRight(string(line), "\r\n")) == 0
	}
	n := copy(p, u.rest)
	u.rest = u.rest[n:]
	return n, nil
}

func (s *Server) answerDatagrams(c *net.UDPConn, server netip.AddrPort) {
	buf := make([]byte, 64<<10)
	for {
		n, client, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an earlier answer was refused
		}
		client = netip.AddrPortFrom(client.Addr().Unmap(), client.Port())
		c.WriteToUDPAddrPort(s.answer(client, server, strings.TrimRight(string(buf[:n]), "\r\n")), client) //nolint:errcheck // a peer that is gone does not want its answer
	}
}

func (s *Server) answer(client, server netip.AddrPort, message string) []byte {
	b, err := json.Marshal(Answer{Identity: s.who, Client: client, Server: server, Message: message})
	if err != nil {
		panic(err) // the type marshals
	}
	return append(b, '\n')
}

func (s *Server) track(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refusing {
		return false
	}
	s.conns[c] = true
	return true
}

func (s *Server) untrack(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	s.closeIfIdle()
}

func (s *Server) closeIfIdle() {
	if !s.refusing || len(s.conns) > 0 {
		return
	}
	select {
	case <-s.idle:
	default:
		close(s.idle)
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
