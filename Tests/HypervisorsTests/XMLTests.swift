// Names that are written into what libvirt reads, and read again.
import Support
import Testing

@testable import Hypervisors

@Suite struct XMLTests {
    @Test(arguments: ["a<b", "it's \"&\"", "<\u{301}/>", "&\u{301};", "'\u{65D}", "plain", "\u{1F600}>"])
    func textThatWasEscapedReadsAsItWas(_ text: String) throws {
        let escaped = XMLElement.escaped(text)
        let element = try XMLElement(parsing: "<a b='\(escaped)'>\(escaped)<c/></a>")
        #expect(element.text == text && element.attributes["b"] == text && element.children.count == 1)
    }
}
