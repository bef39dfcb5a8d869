// Command traffic asks the metadata service and opens mail connections without pause, in every
// way that a container has, until it is killed. It starts no processes: under emulation these
// would take all the time that there is.
package main

import (
	"log"
	"net"
	"time"
)

func main() {
	log.SetFlags(0)
	udp := listen("udp4", "")
	icmp := listen("ip4:icmp", "0.0.0.0")
	go func() {
		for range time.Tick(100 * time.Millisecond) {
			go connect("10.99.0.2:25")
		}
	}()
	metadata := net.IPv4(169, 254, 169, 254)
	echo := []byte{8, 0, 0xf7, 0xff, 0, 0, 0, 0}
	for range time.Tick(10 * time.Millisecond) {
		connect("169.254.169.254:80")
		// That these are refused is what is tested, where they would arrive.
		_, _ = udp.WriteTo([]byte("x"), &net.UDPAddr{IP: metadata, Port: 80})
		_, _ = icmp.WriteTo(echo, &net.IPAddr{IP: metadata})
	}
}

func listen(network, address string) net.PacketConn {
	conn, err := net.ListenPacket(network, address)
	if err != nil {
		log.Fatal(err)
	}
	return conn
}

func connect(address string) {
	if conn, err := net.DialTimeout("tcp4", address, time.Second); err == nil {
		_ = conn.Close()
	}
}
