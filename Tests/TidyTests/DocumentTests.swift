// The documents name files of the repository; this finds those that are not there.
import Glibc
import Testing

@Suite struct DocumentTests {
    @Test(arguments: [
        "README.md", "Docs/Architecture.md", "Docs/Commands.md", "Docs/Dependencies.md", "Docs/NBD.md",
        "Docs/Operations.md", "Docs/Performance.md", "Docs/Security.md", "Docs/Backup.md", "Docs/Hypervisors.md",
        "Docs/Repository.md", "Docs/TLS.md", "Docs/Transports.md", "Docs/VMDK.md", "Docs/VMFS.md",
    ])
    func everyNamedFileExists(document: String) throws {
        let text = try #require(Repository.read(document))
        let folders = ["Sources/", "Tests/", "Scripts/", "Docs/", "Systemd/"]
        // Between backquotes, and the targets of links, which start at the document's folder.
        let names =
            text.split(separator: "`").filter { name in folders.contains { name.hasPrefix($0) } && !name.contains(" ") }
            + text.split(separator: "](").dropFirst().compactMap { $0.split(separator: ")").first }
        for name in names where !name.contains("://") {
            let inFolder = document.hasPrefix("Docs/") && !name.contains("/") ? "Docs/\(name)" : String(name)
            #expect(access("\(Repository.top)/\(inFolder)", F_OK) == 0, "\(document) names \(name), which is not there")
        }
    }
}
