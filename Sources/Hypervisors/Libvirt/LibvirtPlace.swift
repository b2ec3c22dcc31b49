// Which domain of which libvirt is meant, and how its disks come here: the parts of a libvirt: URI.
import Block
import NBD
import Transports

/// A domain of a libvirt, and what has to be known to back it up.
struct LibvirtPlace: Sendable {
    /// As the user wrote it.
    let name: String
    let virsh: Virsh
    let domain: String
    /// Where the disks are served over TCP; nil for a Unix socket on this machine.
    let address: (host: String, port: UInt16)?
    /// Whether libvirt serves them with TLS, and the directory of our certificates for that.
    let hasTLS: Bool
    let certificates: String?
    /// Where scratch files are kept, unless the run says so: on the machine of the domain.
    let scratch: String?

    /// Parameters that are diskgate's. All others are libvirt's.
    private static let ownParameters = ["scratch", "nbd", "tls", "tls-certificates"]

    /// Takes `libvirt:URI/DOMAIN` apart: the domain is the path's last part, or stands at the end of all
    /// (qemu+unix:///session?socket=PATH/DOMAIN).
    ///
    /// - Throws: `.invalid` that says what is wrong or missing.
    init(_ text: String) throws(BlockError) {
        func bad(_ what: String) -> BlockError { BlockError(.invalid, "opening the machine \(text): \(what)") }
        name = text
        let rest = text.dropFirst("libvirt:".count)
        let mark = rest.firstIndex(of: "?") ?? rest.endIndex
        var (path, query) = (String(rest[..<mark]), String(rest[mark...].dropFirst()))
        let segments = path.split(separator: "/", omittingEmptySubsequences: true)
        // qemu:///system/DOMAIN has three, and a host makes four.
        let hasHost = !path.contains(":///")
        if segments.count >= (hasHost ? 4 : 3), let slash = path.lastIndex(of: "/") {
            domain = String(path[path.index(after: slash)...])
            path = String(path[..<slash])
        } else if let slash = query.lastIndex(of: "/") {
            domain = String(query[query.index(after: slash)...])
            query = String(query[..<slash])
        } else {
            throw bad("give libvirt:URI/DOMAIN, for example libvirt:qemu:///system/vm1")
        }
        if domain.isEmpty || domain.hasPrefix("-") { throw bad("the domain is missing") }
        var own: [String: String] = [:]
        var others: [Substring] = []
        for item in query.split(separator: "&") {
            let sides = item.split(separator: "=", maxSplits: 1).map(String.init)
            if sides.count == 2, Self.ownParameters.contains(sides[0]) {
                own[sides[0]] = sides[1]
            } else {
                others.append(item)
            }
        }
        virsh = Virsh(uri: path + (others.isEmpty ? "" : "?" + others.joined(separator: "&")))
        scratch = own["scratch"]
        certificates = own["tls-certificates"]
        guard ["yes", "no", "off", nil].contains(own["tls"]) else { throw bad("tls is yes, or off") }
        hasTLS = own["tls"] == "yes" || certificates != nil
        if let nbd = own["nbd"] {
            guard let place = hostAndPort(nbd) else { throw bad("nbd is HOST:PORT") }
            address = place
            if !hasTLS && own["tls"] == nil {
                throw bad("the disks would cross the network in clear text: give tls=yes, or tls=off")
            }
        } else {
            address = nil
        }
        if hasHost && (address == nil || scratch == nil) {
            throw bad(
                "on another machine libvirt needs an address to serve the disks from, nbd=HOST:PORT, and a directory "
                    + "there for scratch files, scratch=DIRECTORY")
        }
    }

    /// Whether the domain runs on this machine.
    var isLocal: Bool { address == nil }

    /// The export of a disk, as a source.
    func source(_ export: String, socket: String) throws(BlockError) -> SourceReference {
        let name = NBDURI.encoded(export)
        guard let (host, port) = address else {
            return try SourceReference("nbd+unix:///\(name)?socket=\(NBDURI.encoded(socket))")
        }
        let place = host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
        let query = certificates.map { "?tls-certificates=\(NBDURI.encoded($0))" } ?? ""
        return try SourceReference("\(hasTLS ? "nbds" : "nbd")://\(place)/\(name)\(query)")
    }
}
