// What a TLS client is told to trust: combinations and files of which a part would silently have no effect are errors.
import Block
import Glibc
import NBD
import Support
import Testing

/// The error of making a context; nil if it can be made.
private func error(_ change: (inout TLSClientOptions) -> Void) -> BlockError? {
    var options = TLSClientOptions()
    change(&options)
    do throws(BlockError) {
        _ = try TLSClientContext(options)
        return nil
    } catch { return error }
}

private let pin = "sha256:" + String(repeating: "0123456789abcdef", count: 4)

@Suite struct TLSClientOptionsTests {
    @Test func `what a key would leave without effect is refused`() throws {
        try withTemporaryDirectory { directory in
            let keys = try directory.makeFile("keys", Array("me:\(String(repeating: "ab", count: 32))\n".utf8))
            let fingerprint = try Fingerprint(pin)
            #expect(
                error {
                    $0.preSharedKeys = keys
                    $0.identity = "me"
                } == nil)
            let useless: [(String, (inout TLSClientOptions) -> Void)] = [
                ("tls-certificates", { $0.certificates = directory.path }),
                ("fingerprint", { $0.fingerprints = [fingerprint] }),
                ("fingerprint", { $0.narrowing = [fingerprint] }),
                ("tls-hostname", { $0.hostName = "host" }),
                ("tls-verify-peer", { $0.verifiesPeer = false }),
            ]
            for (word, change) in useless {
                let error = error {
                    $0.preSharedKeys = keys
                    change(&$0)
                }
                #expect(error?.kind == .invalid && error?.message.contains(word) == true, "\(word)")
            }
            let lonely = error { $0.identity = "me" }
            #expect(lonely?.kind == .invalid && lonely?.message.contains("tls-psk-file") == true)
        }
    }

    /// Without authorities in the directory, the system's would be trusted, and without a list nothing be revoked.
    @Test(arguments: ["ca-cert.pem", "ca-crl.pem", "client-cert.pem"])
    func `a file that is there and cannot be read is no missing file`(name: String) throws {
        try withTemporaryDirectory { directory in
            _ = try directory.makeFile("client-key.pem", [])
            symlink("nowhere", directory.file(name))
            // Something else has to be wanted from the directory, or it would be refused for having nothing.
            if name == "ca-crl.pem" { _ = try directory.makeFile("ca-cert.pem", certificate()) }
            let error = error {
                $0.certificates = directory.path
                $0.fingerprints = (try? [Fingerprint(pin)]) ?? []
            }
            #expect(error?.kind == .notFound && error?.message.contains(name) == true, "\(String(describing: error))")
        }
    }

    private func certificate() throws -> [UInt8] {
        let made = try Tool.run(
            "openssl",
            [
                "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=ca",
                "-keyout", "/dev/null",
            ])
        return Array(made.output.utf8)
    }
}
