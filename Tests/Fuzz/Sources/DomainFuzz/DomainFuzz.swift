// Fuzzes what virsh prints of a domain, its disks' sizes, its checkpoints and its backup; it was written by whoever
// may define domains.
import Block
import FuzzSupport

@testable import Hypervisors

@main
struct DomainFuzz {
    static func main() {
        fuzz { input in
            // Parts end with a byte of 0.
            let parts = input.split(separator: 0, maxSplits: 2, omittingEmptySubsequences: false).map {
                String(decoding: $0, as: UTF8.self)
            }
            let text = parts[0]
            _ = try? LibvirtBackup(parsing: text)
            let domain = try? LibvirtDomain(
                domain: "lab", xml: text, state: "running\n", sizes: parts.count > 1 ? parts[1] : "",
                checkpoints: parts.count > 2 ? [("diskgate-1", parts[2])] : [])
            for disk in domain?.disks ?? [] {
                require(disk.obstacle != nil || disk.size > 0, "a disk without a size is no obstacle")
                _ = disk.described
            }
            // What is escaped reads as it was.
            let escaped = XMLElement.escaped(text)
            let element = try? XMLElement(parsing: "<a b=\"\(escaped)\">\(escaped)</a>")
            require(element?.text == text && element?.attributes["b"] == text, "escaped text reads otherwise")
        }
    }
}
