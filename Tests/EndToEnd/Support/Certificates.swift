// Certificates and pre-shared keys for tests of TLS, made once by Scripts/lab/make-certificates, which describes them.
import Glibc

/// The test certificates of this process, gone at its end.
struct Certificates: Sendable {
    /// The directory that has all the others.
    let path: String

    /// The certificates, made when first asked for.
    static func made() throws -> Certificates { try result.get() }

    /// A directory as `--tls-certificates` and `tls-certificates=` take it: server, client, expired, ...
    subscript(_ name: String) -> String { "\(path)/\(name)" }

    /// A file of pre-shared keys: keys, wrong or unknown. The identities in the first two are backup and mirror.
    func psk(_ name: String = "keys") -> String { "\(path)/psk/\(name).psk" }

    private static let result = Result { try make() }

    private static func make() throws -> Certificates {
        let top = #filePath.split(separator: "/").dropLast(4).reduce("") { "\($0)/\($1)" }
        var template = Array("/var/tmp/dg-certificates-XXXXXX".utf8CString)
        guard mkdtemp(&template) != nil else { throw Trouble("making a directory: error \(errno)") }
        let certificates = Certificates(
            path: String(decoding: template.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self))
        // A static value is never released, and a C function sees nothing but static values.
        atexit {
            if let made = try? Certificates.made() { _ = try? Tool("rm").run(["-rf", made.path]) }
        }
        let outcome = try Tool("bash").run(["\(top)/Scripts/lab/make-certificates", certificates.path])
        if outcome.status != 0 { throw Trouble("making certificates: \(outcome.errors)") }
        return certificates
    }
}
