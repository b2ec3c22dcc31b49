// Certificates, keys and lists that change while clients are served: nobody is cut off, new clients get what is new.
import Glibc
import Testing

@Suite struct TLSRotationTests {
    /// Python: what the server shows, and clients that never stop.
    private static let prelude = """
        import hashlib, nbd, random, shutil, subprocess, threading
        socket, made, live, image, work = sys.argv[1:6]
        context = wire.client_context(f"{made}/client")
        old, new = [wire.certificate_digest(f"{made}/{name}/server-cert.pem") for name in ("server", "server-next")]
        def shown():
            client = Client(socket).start_tls(context)
            assert client.go() == size
            client.leave()
            return client.server_certificate
        with open(image, "rb") as file: content = file.read()
        size = len(content)
        failures, copies, reads, is_over = [], [0], [0], threading.Event()
        def copy(number, uri):
            while not is_over.is_set():
                done = subprocess.run(["nbdcopy", uri, f"{work}/copy{number}"], capture_output=True, text=True)
                if done.returncode: return failures.append(done.stderr)
                with open(f"{work}/copy{number}", "rb") as file:
                    if file.read() != content: return failures.append("a copy is wrong")
                copies[0] += 1
        def read(uri):
            # One connection from the first change to the last.
            try:
                h = nbd.NBD()
                h.set_uri_allow_local_file(True)
                h.connect_uri(uri)
                dice = random.Random(1)
                while not is_over.is_set():
                    offset = dice.randrange(size - 65536)
                    if h.pread(65536, offset) != content[offset : offset + 65536]: failures.append("a read is wrong")
                    reads[0] += 1
                h.shutdown()
            except nbd.Error as error:
                failures.append(str(error))
        threads = []
        def start(uri):
            for number in range(2):
                threads.append(threading.Thread(target=copy, args=(len(threads), uri), daemon=True))
            threads.append(threading.Thread(target=read, args=(uri,), daemon=True))
            for thread in threads[-3:]: thread.start()
        def goes_on():
            wanted = copies[0] + 3, reads[0] + 3
            while not failures and (copies[0] < wanted[0] or reads[0] < wanted[1]): time.sleep(0.01)
            if failures: end()
        def end():
            is_over.set()
            for thread in threads: thread.join()
            assert not failures, failures
        def replace(path, source):
            shutil.copy(source, path + ".new")
            os.rename(path + ".new", path)
        def rewrite(path, source):
            with open(source, "rb") as file, open(path, "wb") as target: target.write(file.read())

        """

    /// Runs a script against a server over files that it may change, and returns what the server has said.
    private func rotating(_ arguments: (String) -> [String], _ script: String) throws -> String {
        let folder = try Folder()
        let made = try Certificates.made()
        let live = folder.file("live")
        try run("cp", "-r", made["server"], live)
        try run("cp", made.psk(), "\(live)/keys.psk")
        try run("cp", "\(made["revoked"])/crl-before.pem", "\(live)/ca-crl.pem")
        let image = try folder.image("disk", size: 2 << 20)
        var log = ""
        try serving(arguments(live) + [image], in: folder) { (gateway) throws in
            try wire(Self.prelude + script, gateway.socket, made.path, live, image, folder.path)
            log = gateway.log
        }
        return log
    }

    @Test func `the certificate`() throws {
        let log = try rotating(
            { ["--tls-certificates", $0] },
            """
            certificate, key = f"{live}/server-cert.pem", f"{live}/server-key.pem"
            start(f"nbds+unix:///?socket={socket}&tls-certificates={made}/client")
            goes_on()
            assert shown() == old
            # As it should be done.
            replace(key, f"{made}/server-next/server-key.pem")
            goes_on()
            assert shown() == old, "the new key does not belong to the old certificate"
            replace(certificate, f"{made}/server-next/server-cert.pem")
            assert shown() == new
            goes_on()
            # In place, with a moment in which they do not belong together.
            rewrite(certificate, f"{made}/server/server-cert.pem")
            assert shown() == new
            goes_on()
            rewrite(key, f"{made}/server/server-key.pem")
            assert shown() == old
            goes_on()
            # Broken in all ways, and gone: what was good stays.
            for breakage in [b"", b"no certificate", open(certificate, "rb").read()[:300]]:
                with open(certificate, "wb") as file: file.write(breakage)
                assert shown() == old
                goes_on()
            os.unlink(certificate)
            os.unlink(key)
            assert shown() == old
            goes_on()
            # Half of it is back, then all.
            replace(certificate, f"{made}/server-next/server-cert.pem")
            assert shown() == old
            replace(key, f"{made}/server-next/server-key.pem")
            assert shown() == new
            goes_on()
            # Back and forth under load.
            for turn in range(6):
                name = ("server", "server-next")[turn % 2]
                replace(key, f"{made}/{name}/server-key.pem")
                replace(certificate, f"{made}/{name}/server-cert.pem")
                assert shown() == (old, new)[turn % 2]
            goes_on()
            end()
            """)
        #expect(log.contains("TLS: read certificates and keys again"))
        #expect(log.contains("the old certificates and keys stay in use"))
        #expect(log.contains("server-cert.pem") && log.contains("server-key.pem"))
        #expect(!log.contains("starting TLS:"), "nobody was refused")
    }

    @Test func `pre-shared keys`() throws {
        let log = try rotating(
            { ["--tls-psk", "\($0)/keys.psk"] },
            """
            keys = f"{live}/keys.psk"
            def admits(identity, file):
                h = nbd.NBD()
                h.set_tls(nbd.TLS_REQUIRE)
                h.set_tls_username(identity)
                h.set_tls_psk_file(file)
                try:
                    h.connect_unix(socket)
                    return h.pread(512, 0) == content[:512]
                except nbd.Error:
                    return False
            before, other = f"{made}/psk/keys.psk", f"{made}/psk/wrong.psk"
            shutil.copy(before, f"{work}/backup.psk")
            start(f"nbds+unix://backup@/?socket={socket}&tls-psk-file={work}/backup.psk")
            goes_on()
            assert admits("mirror", before) and not admits("mirror", other)
            # The key of mirror changes, that of backup stays, and somebody new comes.
            lines = open(before).read().splitlines()[:1] + open(other).read().splitlines()[1:]
            lines += ["new:00112233445566778899aabbccddeeff"]
            with open(f"{work}/next.psk", "w") as file: file.write("\\n".join(lines) + "\\n")
            replace(keys, f"{work}/next.psk")
            assert admits("mirror", other) and not admits("mirror", before) and admits("new", f"{work}/next.psk")
            goes_on()
            # What is no file of keys changes nothing.
            for breakage in [b"", b"backup\\n", b"backup:zz\\n", open(before, "rb").read()[:20]]:
                with open(keys, "wb") as file: file.write(breakage)
                assert admits("mirror", other) and admits("new", f"{work}/next.psk"), breakage
                goes_on()
            os.unlink(keys)
            assert admits("mirror", other)
            replace(keys, before)
            assert admits("mirror", before) and not admits("mirror", other) and not admits("new", f"{work}/next.psk")
            goes_on()
            end()
            """)
        #expect(log.contains("TLS: read certificates and keys again"))
        #expect(log.contains("the old certificates and keys stay in use"))
    }

    @Test func `the revocation list`() throws {
        let log = try rotating(
            { ["--tls-certificates", $0] },
            """
            def admits():
                try:
                    context = wire.client_context(f"{made}/client", f"{made}/revoked")
                    return Client(socket).start_tls(context).go() == size
                except (ssl.SSLError, Closed):
                    return False
            lists, before = f"{live}/ca-crl.pem", f"{made}/revoked/crl-before.pem"
            start(f"nbds+unix:///?socket={socket}&tls-certificates={made}/client")
            revoked = Client(socket).start_tls(wire.client_context(f"{made}/client", f"{made}/revoked"))
            assert revoked.go() == size
            replace(lists, f"{made}/server/ca-crl.pem")
            assert not admits()
            # Who was admitted before stays.
            assert revoked.read(0, 65536) == content[:65536]
            goes_on()
            with open(lists, "wb") as file: file.write(b"no list")
            assert not admits(), "a broken list admits nobody who was refused"
            goes_on()
            replace(lists, before)
            assert admits()
            goes_on()
            assert revoked.read(0, 65536) == content[:65536]
            end()
            """)
        #expect(log.contains("certificate revoked") && log.contains("ca-crl.pem"))
    }

    @Test func `files of a directory that come later are used, and those that go are missed`() throws {
        let folder = try Folder()
        let made = try Certificates.made()
        let live = folder.file("live")
        try run("cp", "-r", made["server"], live)
        try run("rm", "\(live)/ca-crl.pem")
        func status(_ client: String, _ gateway: Gateway) throws -> Int32 {
            try attempt("nbdinfo", "--size", Access.certificate(client).uri(socket: gateway.socket)).status
        }
        try serving(["--tls-certificates", live, "pattern:1M"], in: folder) { (gateway) throws in
            #expect(try status("revoked", gateway) == 0)
            try run("cp", "\(made["server"])/ca-crl.pem", live)
            #expect(try status("revoked", gateway) != 0 && status("client", gateway) == 0)
            #expect(gateway.log.contains("looked for in revocation lists"))
            try run("rm", "\(live)/ca-crl.pem")
            #expect(try status("revoked", gateway) != 0 && status("client", gateway) == 0)
            try run("rm", "\(live)/ca-cert.pem")
            #expect(try status("other-ca", gateway) != 0 && status("client", gateway) == 0)
            #expect(gateway.log.contains("stay in use"))
        }
        try run("ln", "-s", "nowhere", "\(live)/ca-cert.pem")
        let refused = try attempt("diskgate", "serve", "--tls-certificates", live, "pattern:1M", "--run", "true")
        #expect(refused.status == 1 && refused.errors.contains("ca-cert.pem"))
    }

    @Test func `SIGHUP has the files read at once`() throws {
        let folder = try Folder()
        let made = try Certificates.made()
        let live = folder.file("live")
        try run("cp", "-r", made["server"], live)
        try serving(["--tls-certificates", live, "pattern:1M"], in: folder) { (gateway) throws in
            gateway.signal(SIGHUP)
            #expect(eventually { gateway.log.contains("have not changed") })
            try run("cp", "\(made["server-next"])/server-key.pem", live)
            #expect(!gateway.log.contains("stay in use"))
            gateway.signal(SIGHUP)
            #expect(eventually { gateway.log.contains("stay in use") })
            try run("cp", "\(made["server-next"])/server-cert.pem", live)
            gateway.signal(SIGHUP)
            #expect(eventually { gateway.log.contains("read certificates and keys again") })
            #expect(try run("nbdinfo", "--size", Access.certificate("client").uri(socket: gateway.socket)).status == 0)
        }
    }
}
