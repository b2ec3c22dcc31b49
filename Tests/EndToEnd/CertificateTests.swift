// What tests of TLS rest on: other programs accept the certificates and keys that are meant to be good, and no others.
import Testing

struct CertificateTests {
    /// Runs nbdkit on a socket that is bound already, connects with libnbd, and prints whether the data could be read.
    private let script = """
        import socket, subprocess
        client, identity, options = sys.argv[1], sys.argv[2], sys.argv[3:]
        listener = socket.create_server(("127.0.0.1", 0))
        os.dup2(listener.fileno(), 3)
        command = ["sh", "-c", 'LISTEN_PID=$$ LISTEN_FDS=1 exec nbdkit -f --tls=require "$@" memory 1M', "sh"] + options
        server = subprocess.Popen(command, pass_fds=[3], stderr=subprocess.DEVNULL)
        try:
            handle = nbd.NBD()
            handle.set_tls(nbd.TLS_REQUIRE)
            if identity:
                handle.set_tls_username(identity)
                handle.set_tls_psk_file(client)
            else:
                handle.set_tls_certificates(client)
            handle.connect_tcp("localhost", str(listener.getsockname()[1]))
            print("accepted" if handle.pread(512, 0) == bytes(512) else "wrong data")
        except nbd.Error as error:
            # A server that refuses after its side of the handshake is only seen as gone.
            print("refused")
        finally:
            server.kill()
            server.wait()
        """

    @Test(
        "a client takes good servers' certificates and refuses bad ones",
        arguments: [
            ("server", true), ("server-next", true), ("rsa", true), ("chain", true), ("wrong-host", false),
            ("expired", false), ("not-yet-valid", false), ("revoked", false), ("self-signed", false),
            ("other-ca", false),
        ])
    func servers(directory: String, isGood: Bool) throws {
        let certificates = try Certificates.made()
        let outcome = try python(
            script, certificates["client"], "", "--tls-certificates=\(certificates[directory])")
        #expect(outcome.lines == [isGood ? "accepted" : "refused"])
    }

    @Test(
        "a server takes good clients' certificates and refuses bad ones",
        arguments: [
            ("client", true), ("client2", true), ("rsa", true), ("chain", true), ("expired", false),
            ("not-yet-valid", false), ("revoked", false), ("self-signed", false), ("other-ca", false),
        ])
    func clients(directory: String, isGood: Bool) throws {
        let certificates = try Certificates.made()
        let outcome = try python(
            script, certificates[directory], "", "--tls-certificates=\(certificates["server"])",
            "--tls-verify-peer")
        #expect(outcome.lines == [isGood ? "accepted" : "refused"])
    }

    @Test(
        "a server takes the identities in its file of pre-shared keys, with their keys",
        arguments: [
            ("keys", "backup", true), ("keys", "mirror", true), ("wrong", "backup", false),
            ("unknown", "stranger", false),
        ])
    func preSharedKeys(file: String, identity: String, isGood: Bool) throws {
        let certificates = try Certificates.made()
        let outcome = try python(
            script, certificates.psk(file), identity, "--tls-psk=\(certificates.psk())")
        #expect(outcome.lines == [isGood ? "accepted" : "refused"])
    }
}
