// Metrics as a scraper sees them, parsed by Prometheus' own client library, and scrapers that misbehave.
import Glibc
import Testing

@Suite struct MetricsTests {
    /// Parses a scrape and prints a line per sample: name, labels in order, value.
    private static let parser = """
        import sys
        from prometheus_client.parser import text_string_to_metric_families
        for family in text_string_to_metric_families(sys.stdin.read()):
            assert family.documentation and family.type != "unknown", family
            for s in family.samples:
                labels = ",".join(f"{k}={v!r}" for k, v in sorted(s.labels.items()))
                print(f"{s.name}{{{labels}}} {s.value!r}")
        """

    private func curl(_ arguments: String...) throws -> Outcome {
        try Tool("curl").run(["--silent", "--show-error", "--max-time", "30"] + arguments)
    }

    /// The samples of a scrape over the Unix socket.
    private func scrape(_ folder: Folder) throws -> [String] {
        let text = try curl("--fail", "--unix-socket", folder.file("metrics"), "http://localhost/metrics")
        guard text.status == 0 else { throw Trouble("curl: \(text.errors)") }
        let file = folder.file("scrape")
        let number = open(file, O_CREAT | O_TRUNC | O_WRONLY, 0o600)
        write(number, text.output, text.output.count)
        close(number)
        let parsed = try Tool("python3").run(["-c", Self.parser], input: file)
        guard parsed.status == 0 else {
            throw Trouble("parsing (python3-prometheus-client is needed): \(parsed.errors)\n\(text.text)")
        }
        return parsed.lines
    }

    @Test func `a scrape is understood and tells what was done`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 8 << 20)
        let metrics = ["--metrics", "unix:\(folder.file("metrics"))"]
        let names = ["--name", "plain", "--name", "a\"b\\c\nd"]
        try serving(metrics + names + ["--writable", image, "memory:1M"], in: folder) { (gateway) throws in
            try run(
                "qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", "-c", "read 0 128k", "-c", "read 1M 4k", "-c",
                "flush", "-c", "discard 2M 64k", "-c", "write -z 3M 64k", gateway.uri("plain"))
            let client = try python(
                """
                h = nbd.NBD(); h.add_meta_context("base:allocation"); h.connect_uri(sys.argv[1])
                h.pread(512, 0); h.block_status(4096, 0, lambda *a: 0)
                h.set_strict_mode(0)
                try: h.pread(512, h.get_size()); assert False
                except nbd.Error as error: assert error.errnum == errno.EINVAL
                import subprocess
                print(subprocess.run(["curl", "--silent", "--unix-socket", sys.argv[2], "http://x/metrics"],
                    capture_output=True, text=True, check=True).stdout)
                """, gateway.uri("plain"), folder.file("metrics"))
            let live = client.lines.filter { $0.hasPrefix("diskgate_client_") }
            #expect(live.contains { $0.hasPrefix("diskgate_client_read_bytes_total{client=") && $0.hasSuffix(" 512") })
            #expect(live.contains { $0.hasPrefix("diskgate_client_errors_total{") && $0.hasSuffix(" 1") })
            #expect(live.allSatisfy { $0.contains("export=\"plain\"") && $0.contains("peer=\"unix pid") })

            let samples = try scrape(folder)
            func value(_ sample: String) -> Double? {
                samples.first { $0.hasPrefix(sample + " ") }.flatMap { Double($0.dropFirst(sample.count + 1)) }
            }
            #expect(value("diskgate_export_size_bytes{export='plain'}") == 8_388_608)
            #expect(value("diskgate_export_read_bytes_total{export='plain'}") == 135_680)
            #expect(value("diskgate_export_written_bytes_total{export='plain'}") == 65536)
            #expect(value("diskgate_export_zeroed_bytes_total{export='plain'}") == 65536)
            #expect(value("diskgate_export_discarded_bytes_total{export='plain'}") == 65536)
            #expect(value("diskgate_export_operations_total{export='plain',operation='read'}") == 4)
            #expect(value("diskgate_export_errors_total{export='plain',operation='read'}") == 1)
            #expect((value("diskgate_export_operations_total{export='plain',operation='block_status'}") ?? 0) >= 1)
            let histogram = "diskgate_request_duration_seconds"
            #expect(value("\(histogram)_count{export='plain',operation='read'}") == 4)
            #expect(value("\(histogram)_bucket{export='plain',le='+Inf',operation='read'}") == 4)
            #expect((value("\(histogram)_sum{export='plain',operation='read'}") ?? 0) > 0)
            #expect(value("diskgate_export_accepted_connections_total{export='plain'}") == 2)
            #expect(value(#"diskgate_export_connections{export='a"b\\c\nd'}"#) == 0)
            #expect(value("diskgate_refused_connections_total{reason='limit'}") == 0)
            #expect((value("process_start_time_seconds{}") ?? 0) > 1_700_000_000)
            #expect(samples.contains { $0.hasPrefix("diskgate_build_info{version='") })
            #expect((value("diskgate_request_memory_limit_bytes{}") ?? 0) == 268_435_456)
        }
        #expect(access(folder.file("metrics"), F_OK) != 0, "the socket stays behind")
    }

    @Test func `requests that are not for metrics get their status, and nothing else happens`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        try serving(["--metrics", "tcp://127.0.0.1:0", image], in: folder) { (gateway) throws in
            let address = try #require(
                gateway.log.split(separator: "\n").first { $0.contains("scrapes") }?.split(separator: "/").last)
            let url = "http://\(address)"
            func status(_ arguments: String...) throws -> String {
                let null = ["--output", "/dev/null", "--write-out", "%{http_code}"]
                return try Tool("curl").run(["--silent", "--max-time", "30"] + null + arguments).text
            }
            #expect(try status("\(url)/metrics") == "200")
            #expect(try status("\(url)/metrics?name=x") == "200")
            #expect(try status("\(url)/") == "404")
            #expect(try status("\(url)/metrics/x") == "404")
            #expect(try status("--request", "DELETE", "\(url)/metrics") == "405")
            #expect(try status("--data", "a=b", "\(url)/metrics") == "405")
            #expect(try status("--header", "X: \(String(repeating: "x", count: 9000))", "\(url)/metrics") == "400")
            let head = try curl("--head", "\(url)/metrics")
            #expect(head.status == 0 && head.text.contains("Connection: close"))
            #expect(head.text.contains("Content-Type: text/plain; version=0.0.4"))

            let port = String(address.split(separator: ":").last ?? "")
            let raw = try python(
                """
                import socket
                def ask(data, shut=False):
                    s = socket.create_connection(("127.0.0.1", int(sys.argv[1]))); s.settimeout(30)
                    for piece in data: s.sendall(piece)
                    if shut: s.shutdown(socket.SHUT_WR)
                    reply = b""
                    while True:
                        got = s.recv(65536)
                        if not got: return reply
                        reply += got
                assert ask([b"GET /metrics HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"]).startswith(b"HTTP/1.1 200 ")
                assert ask([b"GET /met", b"rics HTTP/1.0\\n", b"\\n"]).startswith(b"HTTP/1.1 200 ")
                assert ask([b"\\0\\xff\\x16\\x03\\n\\n"]).startswith(b"HTTP/1.1 400 ")
                assert ask([b"GET /metrics\\r\\n\\r\\n"]).startswith(b"HTTP/1.1 400 ")
                assert ask([b"GET http://x/metrics HTTP/1.1\\r\\n\\r\\n"]).startswith(b"HTTP/1.1 400 ")
                assert ask([b"x" * 9000]).startswith(b"HTTP/1.1 400 ")
                assert ask([b"GET /metrics HTTP/1.1\\r\\n"], shut=True) == b""
                # Eight that say nothing keep all others out, for at most ten seconds, and disks are served meanwhile.
                held = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(8)]
                h = nbd.NBD(); h.connect_uri(sys.argv[2]); assert h.pread(1, 0) == b"Z"
                for s in held:
                    s.settimeout(60); assert s.recv(1) == b""
                assert ask([b"GET /metrics HTTP/1.1\\r\\n\\r\\n"]).startswith(b"HTTP/1.1 200 ")
                """, port, gateway.uri())
            #expect(raw.status == 0)
        }
    }

    @Test func `metrics for other machines have to be asked for`() throws {
        let folder = try Folder()
        let image = try folder.filled("disk", size: 1 << 20)
        let arguments = [
            "serve", image, "--listen", "unix:\(folder.file("socket"))", "--metrics", "tcp://0.0.0.0:0",
        ]
        let refused = try Tool.diskgate.run(arguments)
        #expect(refused.status == 1 && refused.errors.contains("--metrics-remote"), "\(refused.errors)")
        try serving(["--metrics", "tcp://0.0.0.0:0", "--metrics-remote", image], in: folder) { (gateway) throws in
            #expect(gateway.log.contains("answering scrapes of metrics at tcp://0.0.0.0:"))
        }
    }
}
