"""OHIF in a browser: what a radiologist does in it, and what can be read from it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

Found = TypeVar("Found")
AXIAL = "mpr-axial"
SECONDS = 90
PAINTED_MM = 3


class Viewer:
    """OHIF's MONAI Label mode.

    Args:
        browser: that shows it.
        url: of the server.
    """

    def __init__(self, browser: WebDriver, url: str) -> None:
        self.browser = browser
        self.url = url

    def studies(self, patient: str) -> str:
        """Open the study list and wait until it names a patient; returns what it says."""
        self.browser.get(f"{self.url}/ohif/")
        return self.wait_for(lambda: self.text if patient in self.text else "")

    def open(self, study: str, series: str = "") -> None:
        """Open a study in the MONAI Label mode, and wait until its slices are shown."""
        self.browser.get(f"{self.url}/ohif/monai-label?StudyInstanceUIDs={study}")
        self.wait_for(lambda: self.run(f"return {VIEWPORT}.getSliceIndex() > 0 && {VIEWPORT}.getNumberOfSlices()"))
        self.wait_for(lambda: "W:" in self.text)
        for button in self.browser.find_elements(By.XPATH, "//button[contains(., 'Confirm and Hide')]"):
            self.browser.execute_script("arguments[0].click()", button)  # the notice that this is for research
        if series:
            assert self.shown_series() == series

    def connect(self) -> None:
        """Press the button beside the server's address."""
        self.panel.find_element(By.CSS_SELECTOR, "button").click()
        self.wait_for(lambda: "Auto-Segmentation" in self.panel.text)
        self.wait_for(lambda: self.run("return Boolean(services.segmentationService.getLabelmapVolume('1'))"))

    def models(self) -> list[str]:
        """The models that the panel offers for Run."""
        shown = self.panel.find_elements(By.CSS_SELECTOR, ".modelSelector option")
        return [option.text for option in shown if option.text]

    def training(self) -> str:
        """How far the panel says that the training is."""
        self.open_tab("Active Learning")
        return str(self.run("return document.querySelector(\".monaiLabelPanel [title='Not Running']\").textContent"))

    def brush_mm(self) -> float:
        """Radius of the brush."""
        group = "services.toolGroupService.getToolGroupIds()[0]"
        return float(self.run(f"return cornerstoneTools.utilities.segmentation.getBrushSizeForToolGroup({group})"))

    def segment(self) -> None:
        """Press Run, and wait until the labelmap has voxels."""
        self.press("button[title='Run Segmentation']")
        self.wait_for(lambda: self.labelmap().any())

    def choose_prompt(self, label: str) -> None:
        """Choose under Point Prompts what the next clicks are about: a label, or ``background``."""
        self.open_tab("Point Prompts")
        rows = ".//tr[contains(@class, 'clickable-row')][td[2][normalize-space()='{}']]"
        row = self.wait_for(lambda: self.panel.find_element(By.XPATH, rows.format(label)))
        self.browser.execute_script("arguments[0].click()", row)

    def click_voxel(self, voxel: tuple[int, int, int]) -> None:
        """Go to a voxel's axial slice, and click where the picture shows that voxel."""
        to_world = "services.segmentationService.getLabelmapVolume('1').imageData.indexToWorld"
        place = self.run(f"return Array.from({to_world}(arguments[0]))", list(voxel))
        self.run(
            f"const at = {VIEWPORT}.getCamera(), place = arguments[0], way = at.viewPlaneNormal;"
            "const off = way.reduce((sum, part, axis) => sum + part * (place[axis] - at.focalPoint[axis]), 0);"
            "const moved = point => point.map((part, axis) => part + off * way[axis]);"
            f"{VIEWPORT}.setCamera({{focalPoint: moved(at.focalPoint), position: moved(at.position)}});"
            f"{VIEWPORT}.render()",
            place,
        )
        time.sleep(0.5)  # drawn with the next frame of the browser
        canvas = self.run(f"return {VIEWPORT}.getCanvas()")
        (across, down), (width, height) = (
            self.canvas_points(np.array([place]))[0],
            self.run("const box = arguments[0].getBoundingClientRect(); return [box.width, box.height]", canvas),
        )
        before = len(self.clicked())
        offset = round(across - width / 2), round(down - height / 2)
        ActionChains(self.browser).move_to_element_with_offset(canvas, *offset).click().perform()
        self.wait_for(lambda: len(self.clicked()) > before)

    def clicked(self) -> list[tuple[int, int, int]]:
        """The voxels of the clicks that are shown, as the panel sends them."""
        to_index = "services.segmentationService.getLabelmapVolume('1').imageData.worldToIndex"
        found = self.run(
            "return cornerstoneTools.annotation.state.getAllAnnotations()"
            ".filter(one => one.metadata.toolName === 'ProbeMONAILabel')"
            f".map(one => Array.from({to_index}(one.data.handles.points[0])).map(Math.round))"
        )
        return [(int(x), int(y), int(z)) for x, y, z in found]

    def run_prompts(self) -> None:
        """Press Run under Point Prompts, and wait until the panel says that the answer has come."""
        self.press("button[title='Run PointPrompts']")
        self.wait_for(lambda: "Running Inference for Point Prompts - Successful" in self.text)

    def paint(self, radius_mm: float = PAINTED_MM) -> None:
        """Choose the brush and drag it over the axial slice with the mouse."""
        self.press("[data-cy='UnetrBrush']")
        set_size = "cornerstoneTools.utilities.segmentation.setBrushSizeForToolGroup"
        self.run(f"for (const id of services.toolGroupService.getToolGroupIds()) {set_size}(id, {radius_mm})")
        canvas = self.run(f"return {VIEWPORT}.getCanvas()")
        drag = ActionChains(self.browser).move_to_element_with_offset(canvas, -20, -30).click_and_hold()
        for _ in range(4):
            drag = drag.move_by_offset(8, 4).pause(0.1)
        drag.release().perform()

    def submit(self) -> None:
        """Press Submit, and wait for the viewer to say that it is done."""
        self.press("[data-cy='UnetrSubmit']")
        self.wait_for(lambda: "now the label of this series" in self.text)

    def open_segmentation(self, study: str) -> list[tuple[str, tuple[int, ...]]]:
        """Open a study's DICOM SEG in the Segmentation mode; returns names and colours of its segments."""
        self.browser.get(f"{self.url}/ohif/segmentation?StudyInstanceUIDs={study}")
        entry = self.wait_for(lambda: self.browser.find_element(By.XPATH, "//*[starts-with(text(), 'UNETR')]"))
        ActionChains(self.browser).double_click(entry).perform()
        self.wait_for(lambda: self.run("return services.segmentationService.getSegmentations().length"))
        found = self.wait_for(
            lambda: self.run(
                "const s = services.segmentationService, [seg] = s.getSegmentations();"
                "const viewport = services.viewportGridService.getActiveViewportId();"
                "return Object.values(seg.segments).filter(Boolean).map(p => [p.label,"
                " Array.from(s.getSegmentColor(viewport, seg.segmentationId, p.segmentIndex))])"
            )
        )
        return [(str(name), tuple(color[:3])) for name, color in found]

    def labelmap(self) -> np.ndarray:
        """The labelmap, shape (columns, rows, slices), in the viewer's own numbers."""
        text, shape = self.run(
            "const v = services.segmentationService.getLabelmapVolume('1');"
            "const d = Uint8Array.from(v.voxelManager.getCompleteScalarDataArray()); let s = '';"
            "for (let i = 0; i < d.length; i += 8192) s += String.fromCharCode(...d.subarray(i, i + 8192));"
            "return [btoa(s), Array.from(v.dimensions)]"
        )
        return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape, order="F")

    def segment_names(self) -> dict[int, str]:
        """The viewer's numbers of the segments, and their names."""
        listed = self.run(
            "return Object.values(services.segmentationService.getSegmentation('1').segments).filter(Boolean)"
            ".map(s => [s.segmentIndex, s.label])"
        )
        return {int(number): str(name) for number, name in listed}

    def jump(self, slice_index: int) -> tuple[np.ndarray, np.ndarray]:
        """Go to an axial slice; returns its picture (rows, columns, RGB) and a point of it, in LPS millimetres."""
        self.run(f"cornerstone.utilities.jumpToSlice({VIEWPORT}.element, {{imageIndex: {slice_index}}})")
        self.wait_for(lambda: self.run(f"return {VIEWPORT}.getSliceIndex()") == slice_index)
        self.run(f"{VIEWPORT}.render()")
        time.sleep(0.7)  # drawn with the next frame of the browser
        picture, focal = self.run(
            f"return [{VIEWPORT}.getCanvas().toDataURL('image/png'), Array.from({VIEWPORT}.getCamera().focalPoint)]"
        )
        image = Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).convert("RGB")
        return np.asarray(image).astype(int), np.array(focal)

    def slices(self) -> int:
        """How many axial slices there are."""
        return int(self.run(f"return {VIEWPORT}.getNumberOfSlices()"))

    def canvas_points(self, points_lps: np.ndarray) -> np.ndarray:
        """Where points lie in the axial picture: (n, 2), column and row."""
        found = self.run(f"return arguments[0].map(p => Array.from({VIEWPORT}.worldToCanvas(p)))", points_lps.tolist())
        return np.array(found)

    def shown_series(self) -> str:
        """Series Instance UID of what the axial viewport shows."""
        return str(
            self.run(
                f"const s = services.viewportGridService.getState().viewports.get('{AXIAL}');"
                "return services.displaySetService.getDisplaySetByUID(s.displaySetInstanceUIDs[0]).SeriesInstanceUID"
            )
        )

    def press(self, selector: str) -> None:
        """Press what a selector finds, also where something lies above it (a notification)."""
        button = self.wait_for(lambda: self.browser.find_element(By.CSS_SELECTOR, selector))
        self.browser.execute_script("arguments[0].click()", button)

    def open_tab(self, name: str) -> None:
        """Open a part of the panel."""
        label = next(e for e in self.panel.find_elements(By.CSS_SELECTOR, "label.tab-label") if name in e.text)
        self.browser.execute_script("arguments[0].click()", label)

    @property
    def panel(self) -> Any:
        """MONAI Label's panel."""
        return self.wait_for(lambda: self.browser.find_element(By.CSS_SELECTOR, ".monaiLabelPanel"))

    @property
    def text(self) -> str:
        """All text on the page."""
        return str(self.browser.find_element(By.TAG_NAME, "body").text)

    def run(self, script: str, *arguments: Any) -> Any:
        """Run JavaScript in the page."""
        return self.browser.execute_script(script, *arguments)

    def wait_for(self, condition: Callable[[], Found], seconds: float = SECONDS) -> Found:
        """Wait until something is so; what cannot be read yet is not so yet."""
        deadline, reason = time.monotonic() + seconds, ""
        while time.monotonic() < deadline:
            try:
                found = condition()
                if found:
                    return found
            except WebDriverException as error:
                reason = str(error.msg)
            time.sleep(0.3)
        raise TimeoutError(f"not so after {seconds} s; the page says: {self.text[:1500]} {reason}")


VIEWPORT = f"services.cornerstoneViewportService.getCornerstoneViewport('{AXIAL}')"
