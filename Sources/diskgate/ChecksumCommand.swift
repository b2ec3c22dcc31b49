// `diskgate checksum`: a digest of a disk's whole content, comparable with sha256sum of a raw copy.
import ArgumentParser
import Block
import LinuxIO

struct ChecksumCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "checksum", abstract: "Print a digest of a disk's content.",
        discussion: "The digest is that of the raw content: sha256sum of a raw copy gives the same.")

    @OptionGroup var source: SourceArguments
    @OptionGroup var report: ReportArguments

    @Option(help: "A digest that OpenSSL knows: sha256, sha512, sha1, md5, blake2b512, sha3-256, ...")
    var algorithm = "sha256"

    private struct Report: Encodable {
        var algorithm: String
        var checksum: String
        var name: String
        var size: UInt64
    }

    func run() throws {
        let opened = try source.open()
        let device = opened.device
        var digest = try Digest(algorithm)
        try device.forEachPiece { (bytes) throws(BlockError) in try digest.update(bytes) }
        let text = try digest.finish()
        if report.json {
            try printJSON(
                Report(algorithm: algorithm, checksum: text, name: device.info.name, size: device.info.size))
        } else {
            print("\(text)  \(source.source)")
        }
        try opened.finish()
    }
}
